"""Systems from outside: what they are shown holds no outcome, and what they answer is read or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from conrec.errors import ConfigError, DataError
from conrec.evaluation.baselines import Histories
from conrec.evaluation.predictions import (
    Choices,
    PairScores,
    Ranked,
    Task,
    check_names,
    named_files,
    read_predictions,
)
from conrec.evaluation.published import shown_pairs
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events

CUT = datetime(2026, 1, 1, tzinfo=UTC)
DAY = 86_400_000_000
CUT_US = int(CUT.timestamp()) * 1_000_000
ITEMS = 6
EVENTS = [
    # User, item, days after the cut, kind. Two windows of two days.
    ("ann", 0, -2, REJECTED),
    ("ann", 1, -1, LIKED),
    ("ann", 2, 1, REJECTED),
    ("ann", 3, 1.5, LIKED),
    ("ann", 4, 3, REJECTED),
    ("bob", 1, -3, REJECTED),
    ("bob", 0, -2, LIKED),
    ("bob", 5, 0.5, REJECTED),
    ("cleo", 2, -1, SHOWN),
    ("cleo", 3, 1, LIKED),
]
"""Ann is measured at the cut and two days later, bob at the cut; cleo is not measured, and has a pair."""


def made(rows: list[tuple[str, int, float, int]] = EVENTS) -> Task:
    """The task of these events."""
    users = sorted({row[0] for row in rows})
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    owners = np.array([users.index(row[0]) for row in rows])
    events = Events(
        pa.array(users),
        np.concatenate(([0], np.cumsum(np.bincount(owners)))),
        np.array([row[1] for row in rows], np.int32),
        np.array([CUT_US + int(row[2] * DAY) for row in rows]),
        np.array([row[3] for row in rows], np.int8),
    )
    anchors = np.array([0, 1, 0, 2]), CUT_US + np.array([0, 0, 2, 0]) * DAY
    starts = events.offsets[anchors[0]]
    until = [
        starts
        + [np.count_nonzero(events.times[slice(*events.offsets[u : u + 2])] <= t) for u, t in zip(*limits, strict=True)]
        for limits in (anchors, (anchors[0], anchors[1] + 2 * DAY))
    ]
    asked = Anchors(anchors[0].astype(np.int32), anchors[1], starts, *until)
    served = np.array([0, 1, 3])
    pairs = shown_pairs(events, asked.take(served))
    items = pa.table({"item_id": [f"i{item}" for item in range(ITEMS)], "text": [""] * ITEMS, "price": range(ITEMS)})
    measured = np.array([True, True, True, False])
    # Which of them comes next, the order does not tell; cleo's are asked of nobody.
    candidates = np.array([[3, 2], [5, -1], [4, 5], [0, 1]], np.int32)
    return Task(events, items, asked, measured, served[pairs.users], pairs.items, candidates, CUT_US)


def turned() -> Task:
    """The same with the anchors in another order, cleo first."""
    other, pair_anchors, pair_items = np.array([3, 2, 1, 0]), 3 - TASK.pair_anchors[::-1], TASK.pair_items[::-1]
    return Task(
        TASK.events,
        TASK.items,
        TASK.anchors.take(other),
        TASK.measured[other],
        pair_anchors,
        pair_items,
        TASK.candidates[other, ::-1],
        CUT_US,
    )


TASK = made()
MET = Histories.at(TASK.events, TASK.anchors).distinct()


def rows_of(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


# What is shown


def test_a_system_sees_the_past_of_all_and_the_histories_of_the_anchors() -> None:
    tables = TASK.tables()
    assert list(tables) == [
        "events",
        "items",
        "anchors",
        "candidates",
        "pairs",
        "histories/2026-01-01T00-00-00Z",
        "histories/2026-01-03T00-00-00Z",
    ]
    assert [(user, item, feedback) for user, item, _, feedback in rows_of(tables["events"])] == [
        ("ann", "i0", "negative"),
        ("ann", "i1", "positive"),
        ("bob", "i1", "negative"),
        ("bob", "i0", "positive"),
        ("cleo", "i2", "neutral"),
    ]
    later = CUT + timedelta(days=2)
    assert rows_of(tables["anchors"]) == [("ann", CUT), ("bob", CUT), ("ann", later)]
    assert tables["items"].column_names == ["item_id", "text"]
    assert [row[3] for row in rows_of(tables["histories/2026-01-01T00-00-00Z"])] == tables["events"][
        "timestamp"
    ].to_pylist()
    assert rows_of(tables["histories/2026-01-03T00-00-00Z"]) == [
        ("ann", later, "i0", CUT - timedelta(days=2), "negative"),
        ("ann", later, "i1", CUT - timedelta(days=1), "positive"),
        ("ann", later, "i2", CUT + timedelta(days=1), "negative"),
        ("ann", later, "i3", CUT + timedelta(days=1.5), "positive"),
    ]


def test_pairs_stand_in_the_order_of_users_and_items_and_say_no_more() -> None:
    pairs = [("ann", CUT, "i2"), ("ann", CUT, "i3"), ("bob", CUT, "i5"), ("cleo", CUT, "i3")]
    assert rows_of(TASK.tables()["pairs"]) == pairs
    assert rows_of(turned().tables()["pairs"]) == pairs


def test_candidates_stand_in_an_order_that_does_not_tell_the_answer() -> None:
    later = CUT + timedelta(days=2)
    asked = [("ann", CUT, "i2"), ("ann", CUT, "i3"), ("ann", later, "i4"), ("ann", later, "i5"), ("bob", CUT, "i5")]
    assert rows_of(TASK.tables()["candidates"]) == asked
    assert rows_of(turned().tables()["candidates"]) == asked


def test_another_outcome_changes_nothing_that_is_shown_before_it() -> None:
    """What ann rejects after the cut and what she likes are exchanged."""
    turned = {("ann", 2): LIKED, ("ann", 3): REJECTED}
    other = made([(*row[:3], turned.get(row[:2], row[3])) for row in EVENTS]).tables()
    differing = {name for name, table in TASK.tables().items() if not table.equals(other[name])}
    assert differing == {"histories/2026-01-03T00-00-00Z"}


def test_nothing_lies_after_the_time_in_a_name() -> None:
    tables = TASK.tables()
    for name, end in (
        ("events", CUT),
        ("histories/2026-01-01T00-00-00Z", CUT),
        ("histories/2026-01-03T00-00-00Z", CUT + timedelta(days=2)),
    ):
        assert max(tables[name]["timestamp"].to_pylist()) <= end
    assert TASK.later == 1


# What is answered


def ranking() -> dict[str, list[Any]]:
    """Two items for each measured anchor, and what ann has met."""
    later = CUT + timedelta(days=2)
    rows = [
        ("ann", CUT, "i5", 1.0),
        ("ann", CUT, "i2", 2.0),
        ("ann", CUT, "i0", 9.0),
        ("bob", CUT, "i4", -1.5),
        ("bob", CUT, "i2", -1.5),
        ("bob", CUT, "i3", -1.5),
        ("ann", later, "i5", 0.25),
    ]
    return dict(zip(("user_id", "anchor_time", "item_id", "score"), map(list, zip(*rows, strict=True)), strict=True))


def scored_pairs() -> dict[str, list[Any]]:
    rows = rows_of(TASK.tables()["pairs"])[::-1]
    columns = dict(zip(("user_id", "anchor_time", "item_id"), map(list, zip(*rows, strict=True)), strict=True))
    return columns | {"score": [0.1, 0.2, 0.3, 0.4]}


def scored_candidates() -> dict[str, list[Any]]:
    rows = rows_of(TASK.tables()["candidates"])
    columns = dict(zip(("user_id", "anchor_time", "item_id"), map(list, zip(*rows, strict=True)), strict=True))
    return columns | {"score": [0.1, 0.2, 0.3, 0.4, 0.5]}


def read(path: Path, columns: dict[str, Any] | pa.Table, k: int = 2) -> Ranked | PairScores | Choices:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    parquet.write_table(table, path / "mine.parquet")
    return read_predictions(f"{path}/mine.parquet", TASK, MET, k)


def test_the_best_items_of_each_anchor_that_its_user_has_not_met(tmp_path: Path) -> None:
    found = read(tmp_path, ranking())
    assert isinstance(found, Ranked)
    # Of equal scores the smaller item comes first; cleo is not measured, and need not be answered.
    assert found.items.tolist() == [[2, 5], [2, 3], [5, -1], [-1, -1]]
    assert found.scores.tolist() == [[2, 1], [-1.5, -1.5], [0.25, -np.inf], [-np.inf, -np.inf]]
    assert (found.items.dtype, found.scores.dtype) == (np.int32, np.float32)


def test_json_lines_without_a_line_hold_no_answer(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="the file has no rows"):
        read_predictions(str(tmp_path), TASK, MET, 2)
    rows = pa.table(ranking()).to_pylist()
    text = "".join(json.dumps(row | {"anchor_time": row["anchor_time"].isoformat()}) + "\n" for row in rows)
    (tmp_path / "b.jsonl").write_text(text)
    found = read_predictions(str(tmp_path), TASK, MET, 2)
    assert isinstance(found, Ranked)
    assert found.items.tolist() == [[2, 5], [2, 3], [5, -1], [-1, -1]]


@pytest.mark.parametrize("make", [made, turned])
def test_scores_of_all_pairs_come_in_the_order_of_the_task(tmp_path: Path, make: Callable[[], Task]) -> None:
    task = make()
    parquet.write_table(pa.table(scored_pairs()), tmp_path / "mine.parquet")
    found = read_predictions(f"{tmp_path}/mine.parquet", task, Histories.at(task.events, task.anchors).distinct(), 2)
    assert isinstance(found, PairScores)
    told = {("ann", 2): 0.4, ("ann", 3): 0.3, ("bob", 5): 0.2, ("cleo", 3): 0.1}
    names = task.events.users.take(pa.array(task.anchors.users[task.pair_anchors])).to_pylist()
    assert found.scores.tolist() == [told[pair] for pair in zip(names, task.pair_items.tolist(), strict=True)]


@pytest.mark.parametrize("make", [made, turned])
def test_scores_of_all_candidates_come_in_the_places_of_the_task(tmp_path: Path, make: Callable[[], Task]) -> None:
    task = make()
    parquet.write_table(pa.table(scored_candidates()), tmp_path / "mine.parquet")
    found = read_predictions(f"{tmp_path}/mine.parquet", task, Histories.at(task.events, task.anchors).distinct(), 2)
    assert isinstance(found, Choices)
    places = [[0.2, 0.1], [0.5, np.nan], [0.3, 0.4], [np.nan, np.nan]]
    expected = np.array(places, np.float32)
    np.testing.assert_array_equal(found.scores, expected if make is made else expected[[3, 2, 1, 0], ::-1])


def test_types_that_change_no_value_are_the_same(tmp_path: Path) -> None:
    table = pa.table(ranking())
    nanoseconds = table["anchor_time"].cast(pa.timestamp("ns", "Europe/Berlin"))
    large = pa.table(
        {
            "score": table["score"].cast(pa.float32()),
            "anchor_time": nanoseconds,
            "user_id": table["user_id"].dictionary_encode(),
            "item_id": table["item_id"].cast(pa.large_string()),
            "place": pa.nulls(len(table)),
        }
    )
    other, found = read(tmp_path, large), read(tmp_path, table)
    assert isinstance(other, Ranked) and isinstance(found, Ranked)
    assert other.items.tolist() == found.items.tolist() and other.scores.tolist() == found.scores.tolist()
    folder = tmp_path / "parts"
    folder.mkdir()
    parquet.write_table(table.slice(0, 3), folder / "a.parquet")
    parquet.write_table(table.slice(3), folder / "b.parquet")
    parts = read_predictions(str(folder), TASK, MET, 2)
    assert isinstance(parts, Ranked) and parts.items.tolist() == found.items.tolist()


def put(column: str, place: int, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda columns: columns | {column: [*columns[column][:place], value, *columns[column][place + 1 :]]}


def without(place: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda columns: {name: [*values[:place], *values[place + 1 :]] for name, values in columns.items()}


def twice(place: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda columns: {name: [*values, values[place]] for name, values in columns.items()}


AT = "at 2026-01-01T00:00:00Z"
REFUSED = {
    "unknown user": (ranking, put("user_id", 3, "dan"), "column user_id holds 'dan', which is no user"),
    "unknown item": (ranking, put("item_id", 1, "i99"), "column item_id holds 'i99', which is no item"),
    "no anchor": (
        ranking,
        put("anchor_time", 3, CUT + timedelta(days=2)),
        "user 'bob' has no anchor at column anchor_time = 2026-01-03T00:00:00Z",
    ),
    "a time that is nobody's": (ranking, put("anchor_time", 0, CUT + timedelta(hours=1)), "2026-01-01T01:00:00Z; "),
    "NaN": (ranking, put("score", 1, np.nan), f"column score holds nan for user 'ann' {AT}, item 'i2'"),
    "infinite": (ranking, put("score", 4, -np.inf), "column score holds -inf for user 'bob'"),
    "too large": (ranking, put("score", 4, 1e39), "column score holds 1e+39 for user 'bob'"),
    "no score": (ranking, put("score", 4, None), "column score is null in 1 rows, first in row 4"),
    "duplicate": (ranking, twice(4), f"user 'bob' {AT}, item 'i2' has more than one row; keep one"),
    "duplicate pair": (scored_pairs, twice(1), f"user 'bob' {AT}, item 'i5' has more than one row"),
    "missing anchor": (
        ranking,
        without(6),
        "no row for user 'ann' at 2026-01-03T00:00:00Z; rank items for all 3 anchors of anchors.parquet",
    ),
    "missing pair": (scored_pairs, without(0), f"no score for user 'cleo' {AT}, item 'i3'; score all 4"),
    "missing candidate": (
        scored_candidates,
        without(4),
        f"no score for user 'bob' {AT}, item 'i5'; score all 5 candidates of candidates.parquet",
    ),
    "a list of candidates": (scored_candidates, without(4), "if these are to be lists: all their rows are candidates"),
    "no pair": (scored_pairs, put("item_id", 2, "i4"), f"scores of pairs: user 'ann' {AT}, item 'i4' is none"),
    "no column": (
        ranking,
        lambda columns: {name: columns[name] for name in ("user_id", "item_id", "score")},
        "column anchor_time is missing; the file has user_id, item_id, score",
    ),
    "numbers": (ranking, lambda columns: columns | {"user_id": range(7)}, "column user_id is int64, not string"),
    "no zone": (
        ranking,
        lambda columns: columns | {"anchor_time": pa.array(columns["anchor_time"]).cast(pa.timestamp("us"))},
        "column anchor_time is timestamp[us] without a time zone",
    ),
    "no rows": (lambda: pa.table(ranking()).slice(0, 0), lambda table: table, "the file has no rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_task_is_refused_by_name(tmp_path: Path, name: str) -> None:
    columns, change, told = REFUSED[name]
    with pytest.raises(DataError) as error:
        read(tmp_path, change(columns()))
    assert str(error.value).startswith(f"{tmp_path}/mine.parquet: ") and told in str(error.value)


def test_more_than_one_mistake_of_a_kind_is_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 'dan', which is no user of the log, as 6 more; "):
        read(tmp_path, ranking() | {"user_id": ["dan"] * 7})


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_predictions(f"{tmp_path}/none.parquet", TASK, MET, 2)
    (tmp_path / "text.parquet").write_text("user_id,item_id")
    with pytest.raises(DataError, match=r"text\.parquet"):
        read_predictions(f"{tmp_path}/text.parquet", TASK, MET, 2)


def test_names_are_words_of_their_own() -> None:
    assert named_files(["mine=a.parquet", "SASRec + odds (v1.2)=s3://b/a=b/"]) == {
        "mine": "a.parquet",
        "SASRec + odds (v1.2)": "s3://b/a=b/",
    }
    for given, told in (
        (["mine"], "write NAME=FILE"),
        (["mine="], "write NAME=FILE"),
        (["=a.parquet"], "'' is no name"),
        (["$x^$=a.parquet"], "is no name"),
        (["<b>=a.parquet"], "is no name"),
        (["1=a.parquet"], "a letter first"),
        (["a" * 41 + "=a.parquet"], "40 in all"),
        (["mine=a.parquet", "mine=b.parquet"], "'mine' is given twice"),
    ):
        with pytest.raises(ConfigError, match=r"--predictions .*") as error:
            named_files(given)
        assert told in str(error.value)
    check_names(["mine"], ["random"])
    for name in ("random", "CoNRec 2"):
        with pytest.raises(ConfigError, match="a system of ours has this name"):
            check_names(["mine", name], ["random"])
