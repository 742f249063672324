"""Which file of a version holds a user: the stable hash of the user id modulo the number of buckets.

    buckets = user_buckets(pa.array(["alice", "bob"]), 8)
    bucket_of("alice", 8)          # the same number, without arrays, for a request that is served

Invariant: writer, audit and reader agree on a user's bucket on every machine and in every release, since published
versions are read by later code; both forms compute one function.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from conrec.hashing import stable_hash

_MASK = (1 << 64) - 1


def user_buckets(users: pa.Array, buckets: int) -> np.ndarray:
    """The bucket of each user id.

    Shape: users (U,) string without nulls; returns (U,) int64 in [0, buckets).
    """
    return (stable_hash(users) % np.uint64(buckets)).astype(np.int64)


def bucket_of(user: str, buckets: int) -> int:
    """The bucket of one user id: FNV-1a and the mix of MurmurHash3, as `stable_hash`, in a few microseconds."""
    value = 0xCBF29CE484222325
    for byte in user.encode(errors="surrogatepass"):
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = ((value ^ (value >> 33)) * factor) & _MASK
    return (value ^ (value >> 33)) % buckets


def bucket_path(shape: str, bucket: int) -> str:
    """The file of a bucket below its version; shape is `data` for item rows, `rules` for rules."""
    return f"{shape}/bucket-{bucket:05d}.parquet"
