"""Which file of a version holds a user: the stable hash of the user id modulo the number of buckets.

    buckets = user_buckets(pa.array(["alice", "bob"]), 8)
    bucket_of("alice", 8)          # the same number, without arrays, for a request that is served

Invariant: writer, audit and reader agree on a user's bucket on every machine and in every release, since published
versions are read by later code; both forms compute one function.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from conrec.hashing import stable_hash, stable_hash_of


def user_buckets(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user id.

    Shape: users (U,) string without nulls; returns (U,) int64 in [0, buckets).
    """
    return (stable_hash(users) % np.uint64(buckets)).astype(np.int64)


def bucket_of(user: str, buckets: int) -> int:
    """The bucket of one user id, in a few microseconds."""
    return stable_hash_of(user) % buckets


def bucket_path(shape: str, bucket: int) -> str:
    """The file of a bucket below its version; shape is `data` for item rows, `rules` for rules."""
    return f"{shape}/bucket-{bucket:05d}.parquet"
