"""Arrays and scalars agree on a user's bucket, for ever."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conrec.buckets import bucket_of, user_buckets


@pytest.mark.long
@given(st.lists(st.text(max_size=20), min_size=1), st.integers(1, 1000))
def test_both_forms_agree(users, buckets):
    assert user_buckets(pa.array(users), buckets).tolist() == [bucket_of(user, buckets) for user in users]


def test_buckets_never_change_between_releases():
    """Published versions are read by later code: these numbers are part of the format."""
    assert [bucket_of(user, 1000) for user in ("", "alice", "用户", "u1")] == [342, 236, 713, 785]


def test_users_spread_evenly():
    users = pa.array([f"user{number}" for number in range(8000)])
    counts = [0] * 8
    for bucket in user_buckets(users, 8):
        counts[bucket] += 1
    assert min(counts) > 850


def test_a_slice_of_an_array_is_hashed_as_itself():
    users = pa.array(["a", "bb", "ccc", "dddd"])
    assert user_buckets(users.slice(2), 97).tolist() == user_buckets(users, 97).tolist()[2:]
