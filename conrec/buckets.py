"""Which file of a version holds a user: the stable hash of the user id modulo the number of buckets.

    buckets = user_buckets(pa.array(["alice", "bob"]), 8)
    bucket_of("alice", 8)          # the same number, without arrays, for a request that is served
    split(tables, folder, GENERATED, 8)   # rows of users in any order -> a local file a bucket
    rows_of(folder, GENERATED, 3)

Invariant: writer, audit and reader agree on a user's bucket on every machine and in every release, since published
versions are read by later code; both forms compute one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from conrec.hashing import stable_hash, stable_hash_of

ROWS_AT_ONCE = 1 << 16
"""Rows that `split` holds: each block of them adds a piece to the file of nearly every bucket."""
_PIECES = pa.ipc.IpcWriteOptions(compression="zstd")


def user_buckets(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user id.

    Shape: users (U,) string without nulls; returns (U,) int64 in [0, buckets).
    """
    return (stable_hash(users) % np.uint64(buckets)).astype(np.int64)


def bucket_of(user: str, buckets: int) -> int:
    """The bucket of one user id, in a few microseconds."""
    return stable_hash_of(user) % buckets


def split(tables: Iterable[pa.Table], folder: Path, schema: pa.Schema, buckets: int) -> None:
    """Writes rows of users, by `user_id`, to a file a bucket in a local folder, for `rows_of`.

    ROWS_AT_ONCE rows, or a larger table, are held, and one file is open, whatever the number of buckets.
    """
    for bucket in range(buckets):
        _file(folder, bucket).write_bytes(b"")  # a file that is gone is so not taken for an empty bucket
    waiting = schema.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        if len(waiting) >= ROWS_AT_ONCE:
            _append(waiting, folder, buckets)
            waiting = schema.empty_table()
    if len(waiting):
        _append(waiting, folder, buckets)


def rows_of(folder: Path, schema: pa.Schema, bucket: int) -> pa.Table:
    """The rows of a bucket that `split` wrote, in their order."""
    pieces = [schema.empty_table()]
    with pa.OSFile(str(_file(folder, bucket))) as file:
        while file.tell() < file.size():
            pieces.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(pieces).combine_chunks()


def _append(rows: pa.Table, folder: Path, buckets: int) -> None:
    """Adds a stream of Arrow's IPC to the file of each bucket that the rows belong to."""
    place = user_buckets(rows["user_id"].combine_chunks(), buckets)
    counts = np.bincount(place, minlength=buckets)
    starts = np.cumsum(counts) - counts
    rows = rows.take(pa.array(np.argsort(place, kind="stable")))
    for bucket in np.flatnonzero(counts):
        piece = rows.slice(starts[bucket], counts[bucket])
        with _file(folder, bucket).open("ab") as file, pa.ipc.new_stream(file, rows.schema, options=_PIECES) as stream:
            stream.write_table(piece)


def _file(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket}.arrows"
