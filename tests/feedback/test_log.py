"""A log divided into buckets says what the whole one says of the users of each."""

from __future__ import annotations

import gc

import numpy as np
import pyarrow as pa
import pytest

from conrec.errors import DataError
from conrec.feedback.events import Coder, Events, encode_events
from conrec.feedback.log import divided, drawn, gathered
from conrec.tables import KINDS, TIMESTAMP

ITEMS = pa.array([f"item{number}" for number in range(9)])


def interactions(rows: int, seed: int, users: int = 40) -> pa.Table:
    """In no order, with ids of several lengths in bytes and events of one moment."""
    rng = np.random.default_rng(seed)
    names = np.array([f"{'ü' * (number % 3)}user{number}" for number in range(users)])
    return pa.table(
        {
            "user_id": names[rng.integers(0, users, rows)],
            "item_id": ITEMS.take(pa.array(rng.integers(0, len(ITEMS), rows))),
            "timestamp": pa.array(rng.integers(0, 50, rows)).cast(TIMESTAMP),
            "feedback": np.array(KINDS)[rng.integers(0, len(KINDS), rows)],
        }
    )


def assert_same(found: Events, wanted: Events) -> None:
    assert found.users.to_pylist() == wanted.users.to_pylist()
    for name in ("offsets", "items", "times", "kinds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("buckets", [1, 3, 100])
def test_each_bucket_has_the_events_of_its_users_however_the_tables_lie(buckets):
    whole = interactions(900, 0)
    events, _ = encode_events(whole, ITEMS, 0.0)
    coder = Coder(ITEMS, 0.0)
    tables = [whole.slice(0, 10), whole.slice(10, 0), whole.slice(10, 700), whole.slice(710)]
    log = divided((coder.code(table) for table in tables), buckets)
    for _ in range(2):  # ordered, then read as it was kept
        for bucket in range(buckets):
            assert_same(log.of_bucket(bucket, buckets), events.of_bucket(bucket, buckets))
    assert sum(len(part) for part in log) == len(events) == log.events
    assert log.last_us == events.times.max()


def test_unknown_items_are_counted_over_all_tables():
    coder = Coder(ITEMS.slice(1), 0.2)
    log = divided((coder.code(interactions(300, seed, users=3)) for seed in range(3)), 4)
    events, unknown = encode_events(
        pa.concat_tables([interactions(300, seed, 3) for seed in range(3)]), ITEMS.slice(1), 0.2
    )
    assert coder.unknown == unknown > 0
    for bucket in range(4):
        assert_same(log.of_bucket(bucket, 4), events.of_bucket(bucket, 4))
    coder.check()
    strict = Coder(ITEMS.slice(1), 0.01, "s3://log")
    strict.code(interactions(300, 0))
    with pytest.raises(
        DataError, match=r"s3://log: column item_id: \d+ of 300 rows .* example 'item0'; the limit is 1.00%"
    ):
        strict.check()


def test_users_are_drawn_by_their_ids_alone_and_with_all_that_they_did():
    whole = interactions(900, 0)
    events, _ = encode_events(whole, ITEMS, 0.0)
    log = divided([Coder(ITEMS, 0.0).code(whole)], 3)
    assert_same(drawn(log, 40, 40, 0), events)
    few = drawn(log, 40, 15, 0)
    assert 5 < len(few.users) < 25
    rows = np.flatnonzero(np.isin(events.users.to_pylist(), few.users.to_pylist()))
    assert_same(few, events.of(rows))
    assert_same(few, drawn([events], 40, 15, 0))
    assert drawn(log, 40, 15, 1).users != few.users


def test_a_block_has_the_ids_of_its_own_users_and_goes_when_every_bucket_is_ordered(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("conrec.feedback.log.ROWS_AT_ONCE", 50)
    whole = interactions(500, 0, users=100).sort_by("user_id")
    log = divided([Coder(ITEMS, 0.0).code(whole)], 2)
    blocks = [whole["user_id"].slice(start, 50).unique() for start in range(0, 500, 50)]
    ids = sum(4 + len(user.as_py().encode()) for block in blocks for user in block)
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.block")) == 17 * 500 + ids
    events, _ = encode_events(whole, ITEMS, 0.0)
    for bucket in (0, 1, 0, 1):
        assert_same(log.of_bucket(bucket, 2), events.of_bucket(bucket, 2))
    assert sorted(file.name for file in tmp_path.glob("*/*")) == ["0.npz", "1.npz"]


def test_the_folder_goes_with_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = divided([Coder(ITEMS, 0.0).code(interactions(50, 0))], 2)
    assert list(log) and list(tmp_path.iterdir())
    del log
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_buckets_are_gathered_whole_and_in_order_until_they_hold_enough():
    events, _ = encode_events(interactions(900, 0), ITEMS, 0.0)
    log = [events.of(np.arange(first, last)) for first, last in ((0, 0), (0, 5), (5, 6), (6, 30), (30, 30), (30, 40))]
    sizes = [len(bucket) for bucket in log]
    for enough, wanted in {
        1: [log[:2], log[2:3], log[3:4], log[4:]],
        sizes[1] + 1: [log[:3], log[3:4], log[4:]],
        len(events) - 1: [log],
        len(events) + 1: [log],
    }.items():
        found = list(gathered(log, enough))
        assert [list(map(id, piece)) for piece in found] == [list(map(id, piece)) for piece in wanted]
    assert list(gathered([], 1)) == []
