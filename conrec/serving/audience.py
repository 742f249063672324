"""Who gets predictions: everybody but a permanent holdout, and of those the share that a release reaches.

    mask = predictions_for(pa.array(["alice", "bob"]), holdout_share=0.01, release_share=1.0)
    in_holdout_one("alice", 0.01)        # the same answer, without arrays, for a request that is served

Users in the holdout are shown what the filter would hide, so that the next training still learns what they reject of
it. Invariants: whether a user belongs depends on the user id and the share alone, the same on every machine and in
every release; a larger share contains a smaller one, so that a canary only grows; holdout and release are drawn
independently of each other and of the buckets.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.hashing import stable_hash, stable_hash_of

_HOLDOUT, _RELEASE = "holdout:", "release:"
# 53 bits of the hash are a float without rounding, and below 1: a share of 1 takes everybody.
_SHIFT, _UNIT = 11, 2.0**-53


def in_holdout(users: pa.Array, share: float) -> np.ndarray:
    """Who is in a holdout of `share` of all users. Shape: users (U,) string without nulls -> (U,) bool."""
    return _drawn(_HOLDOUT, users, share)


def released(users: pa.Array, share: float) -> np.ndarray:
    """Whom a release to `share` of all users reaches. Shape: users (U,) string without nulls -> (U,) bool."""
    return _drawn(_RELEASE, users, share)


def predictions_for(users: pa.Array, holdout_share: float, release_share: float) -> np.ndarray:
    """Who gets predictions: released, and not in the holdout. Shape: users (U,) string -> (U,) bool."""
    return np.asarray(released(users, release_share) & ~in_holdout(users, holdout_share))


def in_holdout_one(user: str, share: float) -> bool:
    """`in_holdout` of one user."""
    return _drawn_one(_HOLDOUT, user, share)


def released_one(user: str, share: float) -> bool:
    """`released` of one user."""
    return _drawn_one(_RELEASE, user, share)


def _drawn(salt: str, users: pa.Array, share: float) -> np.ndarray:
    text = pa.large_string()
    salted = pc.binary_join_element_wise(pa.scalar(salt, text), users.cast(text), pa.scalar("", text))
    return (stable_hash(salted) >> np.uint64(_SHIFT)) * _UNIT < share


def _drawn_one(salt: str, user: str, share: float) -> bool:
    return (stable_hash_of(salt + user) >> _SHIFT) * _UNIT < share
