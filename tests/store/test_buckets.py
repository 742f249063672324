"""Arrays and scalars agree on a user's bucket, for ever."""

from __future__ import annotations

import os
import resource

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conrec import buckets as module
from conrec.buckets import bucket_of, rows_of, split, user_buckets


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


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_more_buckets_than_files_may_be_open(tmp_path, monkeypatch, rows_at_once):
    """Whatever the sizes of the tables, every row lies in its user's bucket, in the order in which it came."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    schema = pa.schema([pa.field("user_id", pa.string()), pa.field("values", pa.list_(pa.int32()))])
    rows = [(f"user{number % 40}", [number] * (number % 3)) for number in range(120)]
    columns = zip(*rows, strict=True)
    table = pa.table([pa.array(*column) for column in zip(columns, schema.types, strict=True)], schema=schema)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
    try:
        split([table.slice(0, 1), table.slice(1, 0), table.slice(1, 59), table.slice(60)], tmp_path, schema, 300)
        found = [rows_of(tmp_path, schema, bucket) for bucket in range(300)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all(one.schema == schema for one in found)
    for bucket, one in enumerate(found):
        expected = [row for row in rows if bucket_of(row[0], 300) == bucket]
        assert list(zip(*one.to_pydict().values(), strict=True)) == expected
