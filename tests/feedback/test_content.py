import json
import os
import shutil
from datetime import UTC, datetime, timedelta

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from conrec.config import InteractionSettings
from conrec.errors import DataError
from conrec.feedback.content import Content, LogContent, content_of, events_content, items_content
from conrec.feedback.events import encode_events
from conrec.tables import INTERACTIONS

DAY = datetime(2024, 1, 1, tzinfo=UTC)


def log(*rows: tuple[str, str, int, str]) -> pa.Table:
    users, items, hours, feedback = zip(*rows, strict=True)
    times = [DAY + timedelta(hours=hour) for hour in hours]
    return pa.table([users, items, times, feedback], schema=INTERACTIONS)


ROWS = [
    ("u1", "a", 0, "negative"),
    ("u1", "b", 1, "positive"),
    ("u2", "a", 1, "neutral"),
    ("u2", "c", 30, "negative"),
    ("u3", "b", 50, "positive"),
]
CUT = round((DAY + timedelta(hours=24)).timestamp() * 1e6)


def settings(path, **changed) -> InteractionSettings:
    return InteractionSettings(path=str(path), **changed)


def write(path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)


def test_the_same_rows_are_the_same_log_wherever_they_lie(tmp_path, monkeypatch):
    write(tmp_path / "log.parquet", log(*ROWS))
    write(tmp_path / "2024-01-09" / "part-1.parquet", log(*reversed(ROWS[:3])))
    write(tmp_path / "2024-01-09" / "part-0.parquet", log(*ROWS[3:]).append_column("device", pa.array(["x", "y"])))
    renamed = log(*ROWS).rename_columns(["who", "what", "timestamp", "feedback"])
    write(tmp_path / "renamed.parquet", renamed)
    expected = LogContent(settings(tmp_path / "log.parquet"), None)
    monkeypatch.chdir(tmp_path)
    for same in (
        settings("log.parquet"),
        settings(f"file://{tmp_path}/log.parquet"),
        settings(tmp_path / "2024-01-09"),
        settings("renamed.parquet", columns={"user_id": "who", "item_id": "what"}),
    ):
        found = LogContent(same, None)
        assert found.until().digest == expected.until().digest
        assert found.until(CUT).digest == expected.until(CUT).digest
        assert found.last_us == expected.last_us


def test_what_came_after_a_moment_changes_nothing_until_it(tmp_path):
    write(tmp_path / "day1.parquet", log(*ROWS))
    before = LogContent(settings(tmp_path / "day1.parquet"), None)
    write(tmp_path / "both" / "day1.parquet", log(*ROWS))
    write(tmp_path / "both" / "day2.parquet", log(("u9", "z", 99, "negative")))
    after = LogContent(settings(tmp_path / "both"), None)
    assert after.until(CUT) == before.until(CUT)
    assert before.until(CUT).rows == 3
    assert after.until().rows == before.until().rows + 1
    assert after.until().digest != before.until().digest


@pytest.mark.parametrize("place", range(4))
def test_every_value_of_an_event_counts(place):
    other = [
        ("u8", "a", 0, "negative"),
        ("u1", "q", 0, "negative"),
        ("u1", "a", 5, "negative"),
        ("u1", "a", 0, "neutral"),
    ]
    changed = events_content(log(other[place], *ROWS[1:]))
    assert changed.digest != events_content(log(*ROWS)).digest


def test_rows_that_exchange_their_values_are_other_rows():
    one = content_of([pa.array(["a", "b"]), pa.array(["b", "a"])])
    assert one != content_of([pa.array(["b", "b"]), pa.array(["a", "a"])])
    assert one != content_of([pa.array(["a", "a"]), pa.array(["b", "b"])])
    assert content_of([pa.array(["ab"]), pa.array([""])]) != content_of([pa.array([""]), pa.array(["ab"])])


def test_a_row_twice_is_not_a_row_once():
    assert events_content(log(ROWS[0], ROWS[0])) != events_content(log(ROWS[0]))
    assert events_content(log(ROWS[0])) + events_content(log(ROWS[0])) == events_content(log(ROWS[0], ROWS[0]))


def test_rules_count_by_what_they_make_of_the_rows(tmp_path):
    write(tmp_path / "log.parquet", log(*ROWS).append_column("stars", pa.array([1, 5, 3, 1, 5])))
    rules = [{"feedback": "negative", "when": "stars <= 2"}, {"feedback": "positive", "when": "stars >= 4"}]
    labelled = LogContent(settings(tmp_path / "log.parquet"), None).until()
    assert LogContent(settings(tmp_path / "log.parquet", rules=rules), None).until() == labelled
    rules[1]["when"] = "stars >= 3"
    assert LogContent(settings(tmp_path / "log.parquet", rules=rules), None).until() != labelled


def test_items_count_by_the_columns_that_are_read():
    items = pa.table(
        {
            "item_id": ["a", "b"],
            "text": ["one", "two"],
            "category": pa.array(["x", None]),
            "embedding": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())),
            "price": [1, 2],
        }
    )

    def with_(name: str, values: pa.Array) -> pa.Table:
        return items.set_column(items.column_names.index(name), name, values)

    whole = items_content(items, "text", "category", "embedding")
    assert items_content(items.take([1, 0]).drop_columns("price"), "text", "category", "embedding") == whole
    assert items_content(with_("text", pa.array(["one", "Two"])), "text", "category", "embedding") != whole
    assert items_content(with_("category", pa.array(["x", ""])), "text", "category", "embedding") != whole
    swapped = with_("embedding", pa.array([[2.0, 1.0], None], pa.list_(pa.float32())))
    assert items_content(swapped, "text", "category", "embedding") != whole
    assert items_content(swapped, "text", "category") == items_content(items, "text", "category")
    empty = with_("embedding", pa.array([[1.0, 2.0], []], pa.list_(pa.float32())))
    assert items_content(empty, "text", "category", "embedding") != whole


def test_a_file_is_read_again_only_when_it_changed(tmp_path):
    path, cache = tmp_path / "log.parquet", tmp_path / "cache.json"
    write(path, log(*ROWS))
    first = LogContent(settings(path), str(cache))
    digests = first.until(CUT).digest, first.until().digest
    # A document that says otherwise is believed as long as the file is the one that it was made of.
    remembered = json.loads(cache.read_text())
    (entry,) = remembered.values()
    entry["all"][0] = 77
    cache.write_text(json.dumps(remembered))
    assert LogContent(settings(path), str(cache)).until().rows == 77
    os.utime(path, ns=(1, 1))
    again = LogContent(settings(path), str(cache))
    assert (again.until(CUT).digest, again.until().digest) == digests
    write(path, log(*ROWS[:2]))
    assert LogContent(settings(path), str(cache)).until().rows == 2
    cache.write_text("{")
    assert LogContent(settings(path), str(cache)).until().rows == 2


def test_a_store_that_tells_no_time_of_change_is_read_again(tmp_path):
    class Untimed(MemoryFileSystem):
        protocol = "untimed"

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("untimed://", "memory://"))

        def info(self, path, **kwargs):
            return {name: value for name, value in super().info(path, **kwargs).items() if name != "created"}

    fsspec.register_implementation("untimed", Untimed, clobber=True)
    cache = str(tmp_path / "cache.json")
    for item in ("a", "b"):  # as long as each other
        sink = pa.BufferOutputStream()
        parquet.write_table(log(("u1", item, 0, "negative")), sink)
        fsspec.filesystem("untimed").pipe_file("/log.parquet", sink.getvalue().to_pybytes())
        found = LogContent(settings("untimed:///log.parquet"), cache).until()
        assert found == events_content(log(("u1", item, 0, "negative")))


NOW = DAY + timedelta(hours=60)


def test_an_earlier_now_is_not_answered_from_what_a_later_one_left(tmp_path):
    path, cache = tmp_path / "log.parquet", str(tmp_path / "cache.json")
    write(path, log(*ROWS))
    admitted = {"max_future_share": 0.5, "max_clock_skew_hours": 0.0}
    assert LogContent(settings(path, now=NOW, **admitted), cache).until().rows == 5
    replayed = LogContent(settings(path, now=DAY + timedelta(hours=40), **admitted), cache)
    assert replayed.until() == events_content(log(*ROWS[:4])) and replayed.last_us == CUT + 6 * 3_600_000_000
    with pytest.raises(DataError, match="later than"):
        _ = LogContent(settings(path, now=DAY, **admitted | {"max_future_share": 0.0}), cache).last_us
    assert LogContent(settings(path, now=NOW, **admitted), cache).until().rows == 5


def test_the_share_of_future_events_is_one_of_the_whole_log_and_the_rest_is_remembered(tmp_path):
    cache = tmp_path / "cache.json"
    write(tmp_path / "log" / "day1.parquet", log(*ROWS))
    admitted = settings(tmp_path / "log", now=NOW, max_future_share=0.2)
    assert LogContent(admitted, str(cache)).until().rows == 5
    for day in (2, 3):  # one of two in its own file, one or two of seven or nine in the log
        rows = [("u4", "a", day, "negative"), *[("u4", "a", 99, "negative")] * (day == 2)]
        write(tmp_path / "log" / f"day{day}.parquet", log(*rows))
        assert LogContent(admitted, str(cache)).until().rows == 4 + day
        # Of the file that may hold more tomorrow nothing is remembered, of the others all.
        assert len(json.loads(cache.read_text())) == day - (day >= 2)


def test_other_rules_are_not_answered_from_what_the_first_ones_left(tmp_path):
    path, cache = tmp_path / "log.parquet", str(tmp_path / "cache.json")
    write(path, log(*ROWS))
    everything = LogContent(settings(path), cache).until()
    excluded = settings(path, rules=[{"feedback": "exclude", "when": 'user_id == "u1"'}])
    assert LogContent(excluded, cache).until().rows == everything.rows - 2


@given(st.permutations(range(12)), st.integers(0, 2**32 - 1))
def test_events_and_digest_are_functions_of_the_rows_not_of_their_order(order, seed):
    random = np.random.default_rng(seed)
    rows = [
        (f"u{random.integers(2)}", "abc"[random.integers(3)], int(random.integers(3)), kind)
        for kind in random.choice(["negative", "positive", "neutral"], 12)
    ]
    table = log(*rows)
    shuffled = table.take(pa.array(order))
    assert events_content(shuffled) == events_content(table)
    one, other = (encode_events(part, pa.array(["a", "b", "c"]), 0.0)[0] for part in (table, shuffled))
    for name in ("offsets", "items", "times", "kinds"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_nothing_is_nothing():
    assert Content().digest == "0-" + "0" * 32


def test_a_copied_log_is_the_same_log(tmp_path):
    write(tmp_path / "a" / "log.parquet", log(*ROWS))
    shutil.copytree(tmp_path / "a", tmp_path / "2024-02-02")
    cache = str(tmp_path / "cache.json")
    assert (
        LogContent(settings(tmp_path / "a"), cache).until()
        == LogContent(settings(tmp_path / "2024-02-02"), cache).until()
    )
