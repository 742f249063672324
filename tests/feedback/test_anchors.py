"""Events, anchors and targets in small worlds, against plain loops, and with planted leaks that must be caught."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from conrec import ragged as ragged_module
from conrec.config import SwingSettings, TimelineSettings
from conrec.errors import DataError
from conrec.feedback import targets as targets_module
from conrec.feedback.anchors import (
    Anchors,
    evaluated_until,
    evaluation_anchors,
    served_anchors,
    training_anchors,
    validation_anchors,
    validation_users,
)
from conrec.feedback.events import LIKED, REJECTED, Events, encode_events
from conrec.feedback.swing import Neighbours, swing_neighbours
from conrec.feedback.targets import Targets, ground_truth_sets, targets
from conrec.ragged import Ragged
from conrec.tables import KINDS

CUT = datetime(2022, 5, 1, tzinfo=UTC)
ITEMS = [f"i{place}" for place in range(10)]
KIND_OF = {"-": "negative", "+": "positive", "0": "neutral"}


def timeline(**settings) -> TimelineSettings:
    return TimelineSettings.model_validate({"cut": CUT} | settings)


def world(*rows: tuple[str, float, str, str]) -> Events:
    """Events from (user, days after the cut, kind, item)."""
    users, days, kinds, items = zip(*rows, strict=True)
    table = pa.table(
        {
            "user_id": list(users),
            "item_id": list(items),
            "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
            "feedback": [KIND_OF[kind] for kind in kinds],
        }
    )
    return encode_events(table, pa.array(ITEMS), 0.0)[0]


def day(events: Events, times: np.ndarray) -> list[float]:
    return np.round((times - timeline().cut_us) / 86_400e6, 6).tolist()


HISTORY = [("u", -3 + place / 10, kind, f"i{place}") for place, kind in enumerate("-+000")]


# Events


def test_events_are_sorted_by_user_time_and_item():
    events = world(("v", 1, "+", "i1"), ("u", 2, "0", "i2"), ("u", 1, "-", "i4"), ("v", 1, "-", "i0"))
    assert events.users.to_pylist() == ["u", "v"]
    assert events.offsets.tolist() == [0, 2, 4]
    assert events.items.tolist() == [4, 2, 0, 1]
    assert [KINDS[kind] for kind in events.kinds] == ["negative", "neutral", "negative", "positive"]
    assert events.items.dtype == np.int32
    assert events.kinds.dtype == np.int8


def test_unknown_items_are_dropped_and_counted_up_to_the_limit():
    table = pa.table(
        {
            "user_id": ["u", "u", "v", "w"],
            "item_id": ["i1", "gone", "i2", "gone"],
            "timestamp": pa.array([CUT] * 4, pa.timestamp("us", "UTC")),
            "feedback": ["negative"] * 4,
        }
    ).replace_schema_metadata({"source": "log.parquet"})
    events, unknown = encode_events(table, pa.array(ITEMS), 0.5)
    assert unknown == 2
    assert events.users.to_pylist() == ["u", "v"]
    assert events.items.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"log\.parquet: column item_id: 2 of 4 rows \(50.00%\).*'gone'.*49.00%.*raise"):
        encode_events(table, pa.array(ITEMS), 0.49)


def test_before_keeps_all_users_and_only_events_until_the_time():
    events = world(("u", 0, "-", "i0"), ("u", 0.000001, "-", "i1"), ("v", 1, "+", "i2"))
    cut = events.before(timeline().cut_us)
    assert cut.users.to_pylist() == ["u", "v"]
    assert cut.offsets.tolist() == [0, 1, 1]
    assert cut.items.tolist() == [0]


# Training anchors


def test_training_anchor_lies_at_the_last_event_before_the_rejection():
    events = world(("u", -3, "+", "i0"), ("u", -2, "0", "i1"), ("u", -1, "-", "i2"), ("u", -0.5, "-", "i3"))
    anchors = training_anchors(events, timeline())
    assert day(events, anchors.times) == [-2, -1]
    assert anchors.starts.tolist() == [0, 0]
    assert anchors.ends.tolist() == [2, 3]
    assert targets(events, anchors).next_negative.tolist() == [2, 3]


def test_events_at_the_anchors_moment_are_history():
    events = world(
        ("u", -3, "+", "i0"), ("u", -2, "0", "i1"), ("u", -2, "+", "i2"), ("u", -1, "-", "i3"), ("u", -1, "-", "i4")
    )
    anchors = training_anchors(events, timeline())
    # Both rejections happen at one moment: one anchor, before both.
    assert day(events, anchors.times) == [-2]
    assert anchors.ends.tolist() == [3]
    assert targets(events, anchors).future_negatives[0].tolist() == [3, 4]


def test_rejection_without_history_or_beyond_the_horizon_sets_no_anchor():
    assert len(training_anchors(world(("u", -2, "-", "i0"), ("u", -2, "-", "i1")), timeline())) == 0
    assert len(training_anchors(world(("u", -20, "+", "i0"), ("u", -2, "-", "i1")), timeline())) == 0


def test_training_anchors_spread_evenly_over_the_rejections():
    rows = [("u", -6 + place / 10, "-", f"i{place % 10}") for place in range(41)]
    anchors = training_anchors(world(*rows), timeline(max_anchors_per_user=4))
    assert anchors.ends.tolist() == [6, 16, 26, 36]  # the middles of four stretches of ten
    assert len(training_anchors(world(*rows), timeline(max_anchors_per_user=100))) == 40


def test_users_mask_leaves_users_out():
    events = world(*[(user, -2 + place / 10, "-", "i1") for user in "uvw" for place in range(3)])
    anchors = training_anchors(events, timeline(), np.array([True, False, True]))
    assert set(anchors.users.tolist()) == {0, 2}


# Planted leaks


def test_event_after_the_cut_reaches_no_training_window_no_history_and_no_swing():
    rows = [(user, -2 + place / 10, "-", item) for user in "uvw" for place, item in enumerate(("i0", "i1"))]
    leaks = [(user, day_, "-", item) for user in "uvw" for day_, item in ((0.00001, "i8"), (1, "i9"))]
    events = world(*rows, *leaks)
    for given_events in (events, events.before(timeline().cut_us)):
        anchors = training_anchors(given_events, timeline())
        wanted = targets(given_events, anchors)
        assert len(anchors) == 3
        assert given_events.times[anchors.window_ends - 1].max() <= timeline().cut_us
        assert not {8, 9} & set(wanted.future_negatives.values.tolist())
        assert not {8, 9} & set(wanted.next_negative.tolist())
    settings = SwingSettings(min_support=0)
    assert {8, 9} <= set(swing_neighbours(events, 10, settings, 0).items.values.tolist())
    training = events.before(timeline().cut_us)
    assert set(swing_neighbours(training, 10, settings, 0).items.values.tolist()) == {0, 1}


def test_event_at_the_cut_itself_belongs_to_training():
    events = world(("u", -1, "+", "i0"), ("u", 0, "-", "i1"))
    anchors = training_anchors(events, timeline())
    assert targets(events, anchors).next_negative.tolist() == [1]


def test_events_after_the_validation_time_train_nothing_that_decides_before_the_cut():
    """Of no user: a part of them alone would let a policy see what it is asked about."""
    rows = [(f"u{user}", day_, "-", f"i{user % 9}") for user in range(50) for day_ in (-3, -2, -1.999, -1, 0, 1)]
    events = world(*rows)
    kept = events.before(timeline().validation_us)
    assert set(np.diff(kept.offsets).tolist()) == {2}  # the anchor lies at day -2, its own moment is history
    anchors = training_anchors(kept, timeline())
    assert len(anchors) == 50
    assert kept.times[anchors.window_ends - 1].max() <= timeline().validation_us
    assert kept.users.equals(events.users)


def test_history_holds_nothing_after_the_anchor_and_window_nothing_before():
    rng = np.random.default_rng(0)
    rows = [
        (f"u{rng.integers(20)}", float(rng.integers(-80, 160)) / 10, "-+0"[rng.integers(3)], f"i{rng.integers(10)}")
        for _ in range(2000)
    ]
    events = world(*rows)
    settings = timeline(validation_share=0.5)
    every = [
        training_anchors(events, settings),
        evaluation_anchors(events, settings),
        validation_anchors(events, settings),
        served_anchors(events, settings.cut_us, 1, 1),
        served_anchors(events, settings.cut_us, 2, 5, settings.cut_us + settings.horizon_us),
    ]
    for anchors in every:
        assert len(anchors)
        for place in range(len(anchors)):
            user, time = anchors.users[place], anchors.times[place]
            own = slice(events.offsets[user], events.offsets[user + 1])
            start, end, window_end = anchors.starts[place], anchors.ends[place], anchors.window_ends[place]
            assert start == own.start
            assert end - start == (events.times[own] <= time).sum()
            assert window_end <= own.stop
            assert np.all(events.times[end:window_end] > time)
            assert np.all(events.times[end:window_end] <= time + settings.horizon_us)


# Evaluation, validation and the night


def test_evaluation_needs_history_of_both_kinds_and_a_rejection_ahead():
    ahead = [("u", 1, "-", "i8"), ("z", 7, "0", "i9")]
    assert len(evaluation_anchors(world(*HISTORY, *ahead), timeline())) == 1
    assert len(evaluation_anchors(world(*HISTORY[1:], ("u", -3, "0", "i0"), *ahead), timeline())) == 0  # no rejection
    assert len(evaluation_anchors(world(HISTORY[0], *HISTORY[2:], ("u", -3, "0", "i1"), *ahead), timeline())) == 0
    assert len(evaluation_anchors(world(*HISTORY[:4], *ahead), timeline())) == 0  # four events
    assert len(evaluation_anchors(world(*HISTORY[:4], HISTORY[0], *ahead), timeline())) == 0  # one item twice
    assert len(evaluation_anchors(world(*HISTORY, ("u", 1, "+", "i8"), ahead[1]), timeline())) == 0  # only a like ahead
    assert len(evaluation_anchors(world(*HISTORY, ("u", 7.1, "-", "i8"), ahead[1]), timeline())) == 0  # too late


def test_evaluation_windows_are_whole():
    def days(end: float) -> list[float]:
        rejections = [("u", place + 0.5, "-", "i8") for place in range(30) if place + 0.5 < end]
        events = world(*HISTORY, *rejections, ("z", end, "0", "i9"))
        return day(events, evaluation_anchors(events, timeline()).times)

    minute = 1 / 1440
    assert days(7) == [0]
    assert days(7 - minute) == [0]  # a log that ends with the day
    assert days(7 - 61 * minute) == []
    assert days(13.9) == [0]
    assert days(21) == [0, 7, 14]


def test_a_log_that_was_read_until_the_end_of_its_windows_has_the_same_anchors():
    """Nothing happens in the last hours of the window; the log goes on after it."""
    rejections = [("u", place + 0.5, "-", "i8") for place in range(6)]
    whole = world(*HISTORY, *rejections, ("z", 7.4, "0", "i9"))
    last_us = int(whole.times.max())
    end_us = evaluated_until(last_us, timeline())
    assert day(whole, np.array([end_us])) == [7]
    read = whole.before(end_us)
    np.testing.assert_array_equal(
        evaluation_anchors(read, timeline(), end_us).times, evaluation_anchors(whole, timeline()).times
    )
    assert len(evaluation_anchors(read, timeline(), end_us)) == 1 and len(evaluation_anchors(read, timeline())) == 0


def test_validation_anchors_end_at_the_cut_and_are_only_of_validation_users():
    rows = [
        (f"u{user}", day_, kind, f"i{place}")
        for user in range(50)
        for place, (day_, kind) in enumerate(
            [(-5, "-"), (-4, "+"), (-3.5, "0"), (-3, "0"), (-2, "0"), (-1, "-"), (1, "-")]
        )
    ]
    events = world(*rows)
    anchors = validation_anchors(events, timeline(validation_share=0.4))
    is_validation = validation_users(events.users, 0.4)
    assert anchors.users.tolist() == np.flatnonzero(is_validation).tolist()
    assert set(day(events, anchors.times)) == {-2}
    assert targets(events, anchors).future_negatives.values.tolist() == [5] * len(anchors)


def daily(users: int, start: float = -30, stop: float = 3) -> Events:
    """Users who reject an item every noon; the days before tell both kinds and enough items."""
    history = [(start - 3, "+", 0), (start - 3, "-", 1), (start - 2, "0", 2), (start - 2, "0", 3), (start - 1, "0", 4)]
    rejections = [(day_ + 0.5, "-", 5) for day_ in np.arange(start, stop)]
    return world(
        *((f"u{user}", day_, kind, f"i{item}") for user in range(users) for day_, kind, item in history + rejections)
    )


def test_of_many_users_about_so_many_are_validation_users_whatever_the_share(monkeypatch):
    rows = [(f"u{user}", day, kind, item) for user in range(200) for _, day, kind, item in HISTORY]
    rows += [(f"u{user}", -0.5, "-", "i9") for user in range(200)]
    events = world(*rows)
    settings = timeline(validation_share=1.0, validation_days=1, horizon_days=1, min_history=2)
    everybody = validation_anchors(events, settings)
    assert len(everybody) == 200
    monkeypatch.setattr("conrec.feedback.anchors.MOST_VALIDATION_USERS", 50)
    few = validation_anchors(events, settings)
    assert 30 < len(few) < 70
    assert set(few.users) == set(np.flatnonzero(validation_users(events.users, 0.25)))


@pytest.mark.parametrize(
    ("validation_days", "horizon_days", "times"),
    [
        (21, 7, [-21, -14, -7]),
        # What is left before the cut is shorter than a horizon: no window reaches past the cut, none is cut short.
        (20, 7, [-20, -13]),
        (7, 7, [-7]),
        (2, 7, [-2]),
    ],
)
def test_validation_anchors_follow_every_horizon_until_the_cut(validation_days, horizon_days, times):
    settings = timeline(validation_share=0.3, validation_days=validation_days, horizon_days=horizon_days)
    events = daily(30)
    anchors = validation_anchors(events, settings)
    chosen = np.flatnonzero(validation_users(events.users, 0.3)).tolist()
    assert 3 < len(chosen) < 20
    pairs = list(zip(anchors.users.tolist(), day(events, anchors.times), strict=True))
    assert sorted(pairs) == [(user, float(time)) for user in chosen for time in times]
    # Each window is a whole horizon, or what lies before the cut where the horizon is longer.
    width = min(validation_days, horizon_days)
    assert set((anchors.window_ends - anchors.ends).tolist()) == {width}
    ends = events.times[anchors.window_ends - 1]
    assert np.all(ends <= np.minimum(anchors.times + settings.horizon_us, settings.cut_us))
    assert np.all(events.times[anchors.ends] > anchors.times)


def test_validation_users_depend_on_the_id_alone():
    ids = pa.array([f"user-{place}" for place in range(5000)])
    chosen = validation_users(ids, 0.2)
    assert 0.18 < chosen.mean() < 0.22
    assert validation_users(ids.slice(100, 50), 0.2).tolist() == chosen[100:150].tolist()
    assert np.all(chosen <= validation_users(ids, 0.3))
    assert validation_users(ids, 1.0).all()


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(-3, 4), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=60
    ),
    st.integers(0, 3),
    st.integers(0, 5),
    st.sampled_from([None, 0, 2]),
)
@run_settings(max_examples=100, deadline=None)
def test_served_anchors_equal_loops_over_the_past_of_each_user(rows, min_negatives, min_history, window):
    """Who is served is decided by what lies until the moment, which counts too, and by nothing later."""
    rows.sort(key=lambda row: row[:2])
    users, times, kinds, items = (np.array(part) for part in zip(*rows, strict=True))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=5))))
    events = Events(pa.array(list("abcde")), offsets, items.astype(np.int32), times, kinds.astype(np.int8))
    anchors = served_anchors(events, 0, min_negatives, min_history, window)
    expected = []
    for user in range(5):
        past = [(k, i) for u, t, k, i in rows if u == user and t <= 0]
        later = [t for u, t, _, _ in rows if u == user and 0 < t <= (window or 0)]
        if sum(k == REJECTED for k, _ in past) >= min_negatives and len({i for _, i in past}) >= min_history:
            start = offsets[user]
            expected.append((user, 0, start, start + len(past), start + len(past) + len(later)))
    assert list(zip(*(column.tolist() for column in anchors.columns), strict=True)) == expected
    # Nothing that happens later is known.
    alone = served_anchors(events.before(0), 0, min_negatives, min_history, window)
    assert alone.users.tolist() == anchors.users.tolist()


# Targets


def test_targets_of_a_window():
    events = world(
        *HISTORY,
        ("u", 1, "+", "i7"),
        ("u", 2, "-", "i6"),
        ("u", 3, "-", "i5"),
        ("u", 4, "-", "i6"),
        ("u", 5, "+", "i5"),
        ("u", 7, "-", "i9"),
        ("u", 7.01, "-", "i4"),
    )
    wanted = targets(events, evaluation_anchors(events, timeline()))
    assert wanted.next_negative.tolist() == [6]
    assert wanted.future_negatives[0].tolist() == [5, 6, 9]
    assert wanted.future_positives[0].tolist() == [5, 7]


def test_window_without_rejection_has_no_next_negative():
    events = world(*HISTORY)
    wanted = targets(events, served_anchors(events, timeline().cut_us, 1, 1))
    assert wanted.next_negative.tolist() == [-1]
    assert wanted.future_negatives.lengths.tolist() == [0]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 2), st.integers(0, 5)), min_size=1, max_size=60
    ),
    st.sampled_from([2, 1 << 22]),
)
@run_settings(max_examples=50, deadline=None)
def test_targets_equal_loops_in_blocks_of_any_size(rows, block):
    rows.sort(key=lambda row: row[:2])
    users, times, kinds, items = (np.array(part) for part in zip(*rows, strict=True))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=4))))
    events = Events(pa.array(list("abcd")), offsets, items.astype(np.int32), times, kinds.astype(np.int8))
    at = np.repeat(np.arange(4), 12), np.tile(np.arange(12), 4)
    anchors = Anchors(
        *at,
        offsets[at[0]],
        np.array([((users < u) | ((users == u) & (times <= t))).sum() for u, t in zip(*at, strict=True)]),
        np.array([((users < u) | ((users == u) & (times <= t + 4))).sum() for u, t in zip(*at, strict=True)]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged_module, "_BLOCK", block)
        wanted = targets(events, anchors)
    for place, (user, time) in enumerate(zip(*at, strict=True)):
        window = [(k, i) for u, t, k, i in rows if u == user and time < t <= time + 4]
        rejected = [i for k, i in window if k == REJECTED]
        assert wanted.next_negative[place] == (rejected[0] if rejected else -1)
        assert wanted.future_negatives[place].tolist() == sorted(set(rejected))
        assert wanted.future_positives[place].tolist() == sorted({i for k, i in window if k == LIKED})


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=4)))
)
@run_settings(max_examples=50, deadline=None)
def test_targets_of_those_that_are_measured_only(rows):
    """An anchor that is not measured has no target, in its place."""
    measured = np.array([flag for flag, _, _ in rows], bool)
    negatives, positives = ([row[place] for row in rows] for place in (1, 2))
    first = np.array([row[0] if row else -1 for row in negatives], np.int32)
    found = Targets(first, ragged(*negatives), ragged(*positives)).only(measured)
    assert found.next_negative.dtype == np.int32
    assert found.next_negative.tolist() == [
        value if flag else -1 for flag, value in zip(measured, first.tolist(), strict=True)
    ]
    for kept, given_rows in ((found.future_negatives, negatives), (found.future_positives, positives)):
        assert len(kept) == len(rows)
        assert [kept[place].tolist() for place in range(len(rows))] == [
            row if flag else [] for flag, row in zip(measured, given_rows, strict=True)
        ]


# Ground-truth sets


def ragged(*rows: list[int]) -> Ragged:
    return Ragged.from_lengths(
        np.array([value for row in rows for value in row], np.int32), np.array([len(row) for row in rows], np.int64)
    )


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_ground_truth_sets_add_neighbours_but_never_liked_items(monkeypatch, block):
    monkeypatch.setattr(targets_module, "_BLOCK", block)
    wanted = Targets(np.array([0, -1, 3]), ragged([0, 1], [], [3]), ragged([4], [2], [3]))
    near = ragged([1, 2, 4], [2], [], [0, 5], [], [])
    neighbours = Neighbours(near, np.ones(6, np.float32), np.ones(6, np.int32), 0.5)
    sets, weights = ground_truth_sets(wanted, neighbours, kappa=0.25)
    # Item 1 is observed and a neighbour: 1. Item 2 is a neighbour of both: once. Item 4 is liked: out. Item 3 is
    # both rejected and liked: what was observed stays.
    assert [sets[place].tolist() for place in range(3)] == [[0, 1, 2], [], [0, 3, 5]]
    assert weights.tolist() == [1, 1, 0.25, 0.25, 1, 0.25]
    assert weights.dtype == np.float32
    # What is observed is told from neighbours by its weight, whatever theirs.
    same, weights = ground_truth_sets(wanted, neighbours, kappa=1.0)
    assert (same.values == sets.values).all()
    assert (weights == 1).tolist() == [True, True, False, False, True, False] and weights.min() > 1 - 1e-6
