"""The frozen codebook: turns item embeddings into semantic IDs, and semantic IDs into vectors that compare items.

Encoding (residual quantisation): R_1 = latent of X, z_l = the code of level l nearest to R_l, R_{l+1} = R_l - z_l. The
reconstruction of an ID is the sum of its codewords, in the space the quantiser works in: the encoder's output for
RQ-VAE, the embedding itself for residual k-means. The similarity of two IDs is the cosine of their reconstructions
after subtracting the catalogue's mean; without that, a few hub codes are near everything.

Invariant: a codebook is never changed. New items are encoded with the same one, an item gets the same ID alone, in any
batch and after `save` and `load`, and a refit is a new catalogue version.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from conrec import storage
from conrec.errors import ArtefactError, DataError

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Codebook:
    """Codewords of each level, the encoder before them, and the mean that similarity subtracts.

    Shape: codewords (L, C, D) float32; center (D,) float32, the mean reconstruction over the catalogue's items;
    encoder: pairs of weight (out, in) and bias (out,) of an MLP with ReLU between its layers, empty for the identity.
    """

    codewords: np.ndarray
    center: np.ndarray
    encoder: tuple[tuple[np.ndarray, np.ndarray], ...] = field(default=())

    @property
    def levels(self) -> int:
        """Codes per semantic ID."""
        return len(self.codewords)

    @property
    def codes(self) -> int:
        """Codewords per level."""
        return int(self.codewords.shape[1])

    @property
    def input_dim(self) -> int:
        """Width of the embeddings that `encode` takes."""
        return int(self.encoder[0][0].shape[1] if self.encoder else self.codewords.shape[2])

    def latent(self, embeddings: np.ndarray) -> np.ndarray:
        """The vectors that are quantised.

        Shape: embeddings (I, input_dim); returns (I, D) float64.
        """
        # float64: the rounding of a matrix product depends on the size of the batch, and in float32 that is enough to
        # give an item that lies between two codewords another ID when it is encoded alone.
        hidden = np.asarray(embeddings, np.float64)
        for position, (weight, bias) in enumerate(self.encoder):
            hidden = hidden @ weight.T.astype(np.float64) + bias
            if position + 1 < len(self.encoder):
                hidden = np.maximum(hidden, 0)
        return hidden

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """The semantic ID of each item.

        Shape: embeddings (I, input_dim) float; returns (I, L) int32.
        Raises `DataError` when the width differs from that of the items the codebook was fitted on, or a value is
        not finite.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.input_dim:
            raise DataError(
                f"embeddings have shape {embeddings.shape}, the codebook was fitted on (items, {self.input_dim}); "
                "embed the new items with the settings of this catalogue version"
            )
        unfinished = ~np.isfinite(embeddings).all(axis=1)
        if unfinished.any():
            raise DataError(f"the embedding of item row {int(unfinished.argmax())} is not finite; mend or remove it")
        codewords = self.codewords.astype(np.float64)
        half_norms = 0.5 * np.einsum("lcd,lcd->lc", codewords, codewords)
        tolerance = 1e-9 * half_norms.max(axis=1)
        semantic_ids = np.empty((len(embeddings), self.levels), np.int32)
        for start in range(0, len(embeddings), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            residual = self.latent(embeddings[rows])
            for level in range(self.levels):
                # argmin |r - c|^2 = argmin |c|^2 / 2 - r.c; of equal codewords the first, whatever the rounding.
                scores = half_norms[level] - residual @ codewords[level].T
                chosen = np.argmax(scores <= scores.min(axis=1, keepdims=True) + tolerance[level], axis=1)
                semantic_ids[rows, level] = chosen
                residual = residual - codewords[level][chosen]  # latent() may have returned the caller's array
        return semantic_ids

    def reconstruct(self, semantic_ids: np.ndarray) -> np.ndarray:
        """The sum of each ID's codewords.

        Shape: semantic_ids (..., L) integers; returns (..., D) float32.
        """
        return np.asarray(self.codewords[np.arange(self.levels), semantic_ids].sum(axis=-2))

    def similarity_vectors(self, semantic_ids: np.ndarray) -> np.ndarray:
        """Unit vectors whose dot product is the similarity of two IDs.

        Shape: semantic_ids (..., L) integers; returns (..., D) float32.
        """
        centered = self.reconstruct(semantic_ids).astype(np.float64) - self.center
        norms = np.linalg.norm(centered, axis=-1, keepdims=True)
        # An ID that lies on the mean has no direction (a catalogue of one ID, say); any unit vector keeps its
        # similarity to itself at 1.
        lies_on_mean = norms[..., 0] < 1e-9
        centered[lies_on_mean] = np.eye(1, centered.shape[-1])
        norms[lies_on_mean] = 1
        return np.asarray(centered / norms, np.float32)

    def save(self, url: str) -> None:
        """Writes one safetensors file to a local path or any fsspec URL."""
        tensors = {"codewords": self.codewords, "center": self.center}
        for position, (weight, bias) in enumerate(self.encoder):
            tensors[f"encoder.{position}.weight"] = weight
            tensors[f"encoder.{position}.bias"] = bias
        contiguous = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
        storage.write_bytes(url, save_tensors(contiguous))

    @classmethod
    def load(cls, url: str) -> Codebook:
        """Reads what `save` wrote; raises `ArtefactError` when the file is something else."""
        try:
            tensors = load_tensors(storage.read_bytes(url))
            layers = sum(name.endswith(".weight") for name in tensors)
            encoder = tuple((tensors[f"encoder.{n}.weight"], tensors[f"encoder.{n}.bias"]) for n in range(layers))
            codewords, center = tensors["codewords"], tensors["center"]
        except (SafetensorError, KeyError) as error:
            raise ArtefactError(f"{url}: not a codebook ({error}); run the catalogue stage again") from None
        return cls(codewords, center, encoder)


def format_semantic_ids(semantic_ids: np.ndarray) -> pa.Array:
    """The written form of semantic IDs, for example <a_12><b_7><c_200>.

    Shape: semantic_ids (N, L) integers; returns (N,) string.
    """
    parts: list[pa.Array | str] = []
    for letter, column in zip(string.ascii_lowercase, np.asarray(semantic_ids).T, strict=False):
        parts += [f"<{letter}_", pc.cast(pa.array(column), pa.string()), ">"]
    return pc.binary_join_element_wise(*parts, "")


def parse_semantic_ids(texts: pa.Array | pa.ChunkedArray, levels: int) -> np.ndarray:
    """The codes of written semantic IDs, the inverse of `format_semantic_ids`.

    Shape: texts (N,) string; returns (N, L) int32. Raises `DataError` naming the first text that is not an ID of so
    many levels.
    """
    letters = string.ascii_lowercase[:levels]
    pattern = "^" + "".join(f"<{letter}_(?P<{letter}>[0-9]{{1,9}})>" for letter in letters) + "$"
    matches = pc.extract_regex(texts, pattern)
    unmatched = np.asarray(pc.is_null(matches))
    if unmatched.any():
        row = int(unmatched.argmax())
        raise DataError(
            f"row {row}: {texts[row].as_py()!r} is not a semantic ID of {levels} levels like <a_12><b_7>..."
        )
    columns = [pc.cast(pc.struct_field(matches, letter), pa.int32()) for letter in letters]
    return np.stack([np.asarray(column) for column in columns], axis=1)
