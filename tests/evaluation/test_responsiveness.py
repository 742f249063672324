"""One more event, in worlds where what changes is known: extended arrays against loops, answers on paper.

Items 0 to 19: the first-level code of item i is i // 5, its category i % 2.
"""

import numpy as np
import pyarrow as pa
import pytest

from conrec.evaluation.baselines import Histories
from conrec.evaluation.responsiveness import probes, responsiveness, with_event
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.targets import targets

ITEMS = 20
CODES, CATEGORIES = np.arange(ITEMS) // 5, np.arange(ITEMS) % 2
ANCHOR, END = 100, 200


def make_events(rows: list[tuple[int, int, int, int]], users: int) -> Events:
    """Events from (user, item, time, kind)."""
    owners, items, times, kinds = np.array(sorted(rows, key=lambda row: (row[0], row[2]))).T
    return Events(
        pa.array([f"{user:03}" for user in range(users)]),
        np.concatenate(([0], np.cumsum(np.bincount(owners, minlength=users)))),
        items.astype(np.int32),
        times,
        kinds.astype(np.int8),
    )


def anchors_at(events: Events, users: list[int], time: int = ANCHOR) -> Anchors:
    starts, stops = events.offsets[users], events.offsets[np.array(users) + 1]
    bounds = list(zip(starts, stops, strict=True))
    ends, window_ends = (
        np.array([first + np.count_nonzero(events.times[first:stop] <= limit) for first, stop in bounds])
        for limit in (time, END)
    )
    return Anchors(np.array(users), np.full(len(users), time), starts, ends, window_ends)


def random_events(seed: int, users: int = 30) -> Events:
    random = np.random.default_rng(seed)
    # Some users have no event at all, some none before the anchor.
    owners = random.choice(np.flatnonzero(random.random(users) < 0.8), 200)
    return make_events(
        [(int(u), int(random.integers(ITEMS)), int(random.integers(END)), int(random.integers(3))) for u in owners],
        users,
    )


# The extra event


@pytest.mark.parametrize("seed", range(5))
def test_the_event_is_the_newest_of_its_history_and_nothing_else_changes(seed: int) -> None:
    events, random = random_events(seed), np.random.default_rng(seed)
    anchors = anchors_at(events, random.permutation(30)[:20].tolist())
    items = random.integers(ITEMS, size=20)
    extended, moved = with_event(events, anchors, items, LIKED)

    before, after = Histories.at(events, anchors), Histories.at(extended, moved)
    bounds = list(zip(before.items.offsets[:-1], before.items.offsets[1:], strict=True))
    for row, (first, stop) in enumerate(bounds):
        assert after.items[row].tolist() == [*before.items[row], items[row]]
        assert after.kinds[first + row : stop + row + 1].tolist() == [*before.kinds[first:stop], LIKED]
        assert extended.times[moved.ends[row] - 1] == ANCHOR
    for one, other in zip(
        vars(targets(events, anchors)).values(), vars(targets(extended, moved)).values(), strict=True
    ):
        np.testing.assert_array_equal(getattr(one, "values", one), getattr(other, "values", other))
    assert np.array_equal(moved.users, anchors.users) and np.array_equal(moved.times, anchors.times)

    # Without the new events everything is as it was, all users included.
    added = np.zeros(len(extended), bool)
    added[moved.ends - 1] = True
    rest = extended.where(~added)
    for name in ("offsets", "items", "times", "kinds"):
        np.testing.assert_array_equal(getattr(rest, name), getattr(events, name))
        assert getattr(extended, name).dtype == getattr(events, name).dtype
    same_user = np.diff(extended.rows) == 0
    assert (np.diff(extended.times)[same_user] >= 0).all()


def test_two_anchors_of_one_user_are_refused() -> None:
    events = make_events([(0, 1, 10, SHOWN)], 1)
    with pytest.raises(ValueError, match="two anchors are of one user"):
        with_event(events, anchors_at(events, [0, 0]), np.array([1, 2]), REJECTED)


# Probes


def test_the_probe_was_shown_and_never_judged() -> None:
    """Item 3 is the only one without an opinion: 1 was also rejected, 2 also liked, 4 is shown after the anchor."""
    rows = [(0, 1, 10, SHOWN), (0, 1, 20, REJECTED), (0, 2, 30, LIKED), (0, 2, 40, SHOWN), (0, 3, 50, SHOWN)]
    events = make_events([*rows, (0, 4, 101, SHOWN)], 1)
    found = {probes(events, anchors_at(events, [0]), 5, seed).items.tolist()[0] for seed in range(30)}
    assert found == {3}


def test_shown_items_have_equal_chances() -> None:
    rows = [(user, item, 10 + item, SHOWN) for user in range(600) for item in (1, 2, 2, 2, 7)]
    events = make_events(rows, 600)
    found = probes(events, anchors_at(events, list(range(600))), 600, seed=0)
    assert found.shown.all()
    # 200 each, standard deviation 11.5.
    assert (np.abs(np.bincount(found.items, minlength=8)[[1, 2, 7]] - 200) < 50).all()


def test_who_was_shown_nothing_else_gets_what_others_met_by_exposure_up_to_the_anchor() -> None:
    """User 0's opinions are 1 and 2; the rest is met 30 : 10 by others, item 9 by everybody only later."""
    rows = [(0, 1, 10, REJECTED), (0, 2, 20, LIKED)]
    rows += [(user, 5 if user % 4 else 6, 30, SHOWN) for user in range(1, 41)]
    rows += [(user, 9, ANCHOR + 1, SHOWN) for user in range(41)] * 5
    events = make_events(rows, 41)
    found = [probes(events, anchors_at(events, [0]), 1, seed) for seed in range(400)]
    assert not any(probe.shown.any() for probe in found)
    counts = np.bincount([int(probe.items[0]) for probe in found], minlength=10)
    assert counts[[5, 6]].sum() == 400
    assert abs(counts[5] - 300) < 45  # standard deviation 8.7


def test_who_has_met_everything_is_left_out() -> None:
    events = make_events([(0, 1, 10, REJECTED), (1, 1, 10, LIKED), (1, 2, 200, SHOWN)], 2)
    assert len(probes(events, anchors_at(events, [0, 1]), 5, 0).anchors) == 0


def test_the_sample_is_random_repeatable_and_has_one_anchor_a_user() -> None:
    events = make_events([(user, 3, time, SHOWN) for user in range(50) for time in (10, 110)], 50)
    both = [anchors_at(events, list(range(50)), time) for time in (ANCHOR, ANCHOR + 50)]
    anchors = Anchors(*(np.concatenate(columns) for columns in zip(*(vars(a).values() for a in both), strict=True)))
    found = probes(events, anchors, 20, seed=1)
    assert len(found.anchors) == 20
    assert len(np.unique(anchors.users[found.anchors])) == 20
    assert 0 < np.count_nonzero(found.anchors >= 50) < 20, "neither the first nor the last anchor of everybody"
    assert 5 < np.count_nonzero(anchors.users[found.anchors] >= 25) < 15, "nor the first users"
    np.testing.assert_array_equal(found.anchors, probes(events, anchors, 20, seed=1).anchors)
    assert not np.array_equal(found.anchors, probes(events, anchors, 20, seed=2).anchors)
    assert len(probes(events, anchors, 1000, seed=1).anchors) == 50


# The answer


def newest(events: Events, anchors: Anchors) -> tuple[np.ndarray, np.ndarray]:
    """Item and kind of the newest event of each history."""
    return events.items[anchors.ends - 1], events.kinds[anchors.ends - 1]


def answer(serve, rows: list[tuple[int, int, int, int]] | None = None, users: int = 4) -> dict:
    """Every user liked item 19, then was shown item 2 (code 0, even): the probe. In the window all like 4."""
    rows = rows or [
        row for user in range(users) for row in ((user, 19, 10, LIKED), (user, 2, 20, SHOWN), (user, 4, 110, LIKED))
    ]
    events = make_events(rows, users)
    anchors = anchors_at(events, list(range(users)))
    return responsiveness(
        serve, events, anchors, targets(events, anchors), CODES, CATEGORIES, sample=100, seed=0, resamples=50
    )


def values(figures):
    """The point values alone."""
    if not isinstance(figures, dict):
        return figures
    return figures["value"] if "value" in figures else {name: values(inner) for name, inner in figures.items()}


def serve_listener(events: Events, anchors: Anchors) -> np.ndarray:
    """Before: 0, 10, 11, 12. Rejecting 2 blocks 1, 3, 4 of its code, and 15, for 10, 11, 12, 0; a like frees 0."""
    items, kinds = newest(events, anchors)
    rejected, liked = ((items == 2) & (kinds == kind) for kind in (REJECTED, LIKED))
    lists = np.tile([0, 10, 11, 12], (len(anchors), 1))
    lists[rejected] = [1, 3, 4, 15]
    lists[liked] = [16, 10, 11, 12]
    return lists


def test_a_listener_on_paper() -> None:
    found = answer(serve_listener)
    assert found["anchors"] == 4
    assert found["probes_shown"] == 1
    assert values(found["rejected"]) == {
        "newly blocked": 4,
        "newly unblocked": 4,
        "probe blocked before": 0,
        "probe blocked after": 0,
        # 1, 3, 4 of 1, 3, 4, 15; 0 of 0, 10, 11, 12, both as what goes and as what was there: 3/4 over 1/4.
        "same code": {"newly blocked": 3 / 4, "newly unblocked": 1 / 4, "blocked before": 1 / 4, "relative change": 2},
        # Even: 4; 0, 10, 12.
        "same category": {
            "newly blocked": 1 / 4,
            "newly unblocked": 3 / 4,
            "blocked before": 3 / 4,
            "relative change": pytest.approx(-2 / 3),
        },
        # Item 4, which is newly blocked, is liked later: the collateral.
        "liked later": {"newly blocked": 1 / 4, "newly unblocked": 0},
    }
    assert values(found["liked"]) == {
        "newly blocked": 1,
        "newly unblocked": 1,
        "probe blocked before": 0,
        "probe blocked after": 0,
        "same code": {"newly blocked": 0, "newly unblocked": 1, "blocked before": 1 / 4, "relative change": -1},
        "same category": {"newly blocked": 1, "newly unblocked": 1, "blocked before": 3 / 4, "relative change": 0},
        "liked later": {"newly blocked": 0, "newly unblocked": 0},
    }


def test_a_deaf_system_changes_nothing_and_has_no_share_of_nothing() -> None:
    found = values(answer(lambda events, anchors: np.tile([0, 10, -1], (len(anchors), 1))))
    for kind in ("rejected", "liked"):
        assert found[kind]["newly blocked"] == found[kind]["newly unblocked"] == 0
        assert found[kind]["same code"]["relative change"] == 0
        undefined = [found[kind]["liked later"].values(), [found[kind]["same code"]["blocked before"]]]
        assert np.isnan([value for group in undefined for value in group]).all()


def test_a_system_with_one_answer_to_every_event_is_seen_as_such() -> None:
    """Blocks the code of whatever came last, also of a like: the like then frees nothing of the probe's code."""

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        items, kinds = newest(events, anchors)
        return np.where((kinds == SHOWN)[:, None], [10, 11], CODES[items][:, None] * 5 + np.array([0, 1]))

    found = values(answer(serve))
    assert found["rejected"] == found["liked"]
    assert found["liked"]["same code"]["newly blocked"] == 1
    assert found["liked"]["same code"]["newly unblocked"] == 0


def test_blocking_the_probe_itself_is_no_answer_in_taste() -> None:
    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        items, kinds = newest(events, anchors)
        return np.where((kinds == REJECTED)[:, None], np.stack([items, np.full_like(items, 10)], 1), [11, 10])

    found = values(answer(serve))["rejected"]
    assert found["probe blocked before"] == 0
    assert found["probe blocked after"] == 1
    assert found["newly blocked"] == 0
    assert np.isnan(found["same code"]["newly blocked"])
    assert found["newly unblocked"] == 1
    # Blocked before, gone after: the probe counts neither as unblocked nor in the share before.
    found = values(answer(lambda *served: np.where(newest(*served)[1][:, None] == SHOWN, [2, 10], [11, 12])))
    for kind in ("rejected", "liked"):
        assert found[kind]["probe blocked before"] == 1
        assert found[kind]["probe blocked after"] == 0
        assert found[kind]["newly blocked"] == 2
        assert found[kind]["newly unblocked"] == 1
        assert found[kind]["same code"]["blocked before"] == found[kind]["same code"]["newly unblocked"] == 0


def test_the_share_before_is_of_the_same_anchors() -> None:
    """Users 0 and 1 hold only the probe's code before and are blocked nothing new, but user 1 is freed of an item by a
    rejection; users 2 and 3, who are, hold none of it."""

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        changes = anchors.users >= 2
        last = newest(events, anchors)[1]
        lists = np.where(changes[:, None], [10, 11], [0, 1])
        lists[changes & (last == REJECTED)] = [10, 3]
        lists[(anchors.users == 1) & (last == REJECTED)] = [0, -1]
        lists[changes & (last == LIKED)] = [10, -1]
        return lists

    found = values(answer(serve))
    assert found["rejected"]["newly blocked"] == 0.5
    assert found["rejected"]["same code"]["newly blocked"] == 1
    assert found["rejected"]["same code"]["blocked before"] == 0
    # Over all anchors (1 + 1 + .5 + .5) / (1 + 1 + 0 + 0) - 1.
    assert found["rejected"]["same code"]["relative change"] == 0.5
    # A like that only frees has anchors where it freed something.
    assert found["liked"]["same code"]["newly unblocked"] == 0
    assert found["liked"]["same code"]["blocked before"] == 0
    assert np.isnan(found["liked"]["same code"]["newly blocked"])


def test_without_categories_only_that_group_is_missing() -> None:
    events = make_events([(0, 2, 20, SHOWN), (0, 1, 110, REJECTED)], 1)
    anchors = anchors_at(events, [0])
    found = responsiveness(serve_listener, events, anchors, targets(events, anchors), CODES, None, 5, 0, resamples=20)
    assert "same category" not in found["rejected"]
    assert found["rejected"]["same code"]["newly blocked"]["value"] == 3 / 4


def test_intervals_are_those_of_the_users() -> None:
    """Half of 60 users answer with the probe's code, half with another: a share of .5, its interval that of coins."""

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        answering = np.where(anchors.users % 2, 1, 15)
        return np.where(newest(events, anchors)[1] == REJECTED, answering, 10)[:, None]

    share = answer(serve, users=60)["rejected"]["same code"]["newly blocked"]
    assert share["value"] == 0.5
    # Standard deviation .065.
    assert 0.3 < share["low"] < 0.45 < 0.55 < share["high"] < 0.7


def test_a_served_list_must_be_one_per_anchor_without_repeats() -> None:
    with pytest.raises(ValueError, match="anchor 0 is predicted an item twice"):
        answer(lambda events, anchors: np.tile([3, 3], (len(anchors), 1)))
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 4 anchors"):
        answer(lambda events, anchors: np.array([[3, 4]]))


def test_no_anchor_at_all_is_not_an_error() -> None:
    events = make_events([(0, 1, 10, REJECTED)], 1)
    found = responsiveness(
        lambda events, anchors: np.zeros((len(anchors), 0), np.int32),
        events,
        anchors_at(events, [0]),
        targets(events, anchors_at(events, [0])),
        CODES,
        CATEGORIES,
        sample=5,
        seed=0,
    )
    assert found["anchors"] == 0
    assert np.isnan(found["rejected"]["newly blocked"]["value"])
