"""Which file of a version holds a user: the stable hash of the user id modulo the number of buckets.

    buckets = user_buckets(pa.array(["alice", "bob"]), 8)
    bucket_of("alice", 8)          # the same number, without arrays, for a request that is served
    split(tables, folder, GENERATED, 8)   # rows of users in any order -> a local file a bucket

Invariant: writer, audit and reader agree on a user's bucket on every machine and in every release, since published
versions are read by later code; both forms compute one function.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from conrec.hashing import stable_hash, stable_hash_of


def user_buckets(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user id.

    Shape: users (U,) string without nulls; returns (U,) int64 in [0, buckets).
    """
    return (stable_hash(users) % np.uint64(buckets)).astype(np.int64)


def bucket_of(user: str, buckets: int) -> int:
    """The bucket of one user id, in a few microseconds."""
    return stable_hash_of(user) % buckets


def split(tables: Iterable[pa.Table], folder: Path, schema: pa.Schema, buckets: int) -> None:
    """Writes rows of users, by `user_id`, to `<bucket>.parquet` in a local folder; one table at a time is held."""
    with ExitStack() as stack:
        writers = [
            stack.enter_context(parquet.ParquetWriter(folder / f"{bucket}.parquet", schema))
            for bucket in range(buckets)
        ]
        for table in tables:
            place = user_buckets(table["user_id"].combine_chunks(), buckets)
            for bucket in np.unique(place):
                writers[bucket].write_table(table.filter(pa.array(place == bucket)))
