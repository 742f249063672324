"""Negative interests and what they cover, in a world whose weights and shares are computed on paper.

Items 0 to 9 have the first-level codes 0 0 1 1 2 2 3 3 4 4; times are days, the anchors lie at day 100.
"""

import numpy as np
import pyarrow as pa
import pytest

from conrec.evaluation.target_coverage import TARGETS, negative_interests, target_coverage
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.swing import Neighbours
from conrec.ragged import Ragged

DAY = 86_400_000_000
CODES = np.arange(10) // 2
ANCHOR = 100


def world(*rows: tuple[int, float, int, int]) -> tuple[Events, Anchors]:
    """Events from (user, day, kind, item), and one anchor per user at day 100 with a window of a week."""
    users, days, kinds, items = np.array(sorted(rows, key=lambda row: row[:2])).T
    count = int(users.max()) + 1
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users.astype(int), minlength=count))))
    times = np.round(days * DAY).astype(np.int64)
    events = Events(pa.array([f"u{user}" for user in range(count)]), offsets, items.astype(np.int32), times, kinds)
    ends, window_ends = (
        offsets[:-1] + np.bincount(users[times <= time].astype(int), minlength=count)
        for time in (ANCHOR * DAY, (ANCHOR + 7) * DAY)
    )
    return events, Anchors(np.arange(count), np.full(count, ANCHOR * DAY), offsets[:-1], ends, window_ends)


def neighbours_of(near: dict[int, list[int]]) -> Neighbours:
    items = np.array([item for place in range(10) for item in near.get(place, [])], np.int32)
    rows = Ragged.from_lengths(items, np.array([len(near.get(place, [])) for place in range(10)]))
    return Neighbours(rows, np.ones(len(items), np.float32), np.ones(len(items), np.int32), 0.0)


def interests(*rows: tuple[int, float, int, int], half_life: float = 14, lookback: float = 60, top: int = 4) -> list:
    events, anchors = world(*rows)
    found = negative_interests(events, anchors, CODES, lookback, half_life, top)
    return [found[row].tolist() for row in range(len(found))]


def test_a_rejection_weighs_half_as_much_a_half_life_earlier() -> None:
    # Code 1 twice, 15 days earlier than code 0 once: 2 * .5^(15/14) = .95 of it; 13 days earlier 1.05.
    assert interests((0, 70, REJECTED, 2), (0, 70, REJECTED, 3), (0, 85, REJECTED, 0)) == [[0, 1]]
    assert interests((0, 72, REJECTED, 2), (0, 72, REJECTED, 3), (0, 85, REJECTED, 0)) == [[1, 0]]
    assert interests((0, 70, REJECTED, 2), (0, 70, REJECTED, 3), (0, 85, REJECTED, 0), half_life=20) == [[1, 0]]


def test_the_strongest_come_first_and_ties_go_to_the_lower_code() -> None:
    rows = [(0, 99, REJECTED, item) for item in (8, 6, 4, 4)]
    assert interests(*rows) == [[2, 3, 4]]
    assert interests(*rows, top=1) == [[2]]
    assert interests(*rows, top=2) == [[2, 3]]


def test_only_rejections_of_the_look_back_up_to_the_anchor_are_interests() -> None:
    history = [(0, 90, LIKED, 0), (0, 91, SHOWN, 2), (0, 39.9, REJECTED, 4), (0, 40, REJECTED, 6)]
    assert interests(*history, (0, 100.1, REJECTED, 8), (1, 90, REJECTED, 0)) == [[3], [0]]
    assert interests(*history, lookback=61) == [[3, 2]]


def test_coverage_on_paper() -> None:
    """Top 1 and top 2 interests are codes 0 and 1 for all.

    u0 rejects code 0 next: everything is covered by top 1. u1 rejects code 4, then code 1: the next negative is not
    covered, the window by top 2. u2 rejects code 4, whose neighbour has code 0. u3 likes that neighbour in the window,
    so that it is none. u4 rejects nothing later and does not count.
    """
    rows = [row for user in range(5) for row in ((user, 90, REJECTED, 0), (user, 80, REJECTED, 2))]
    rows += [(0, 101, REJECTED, 1), (1, 101, REJECTED, 8), (1, 102, REJECTED, 3), (2, 101, REJECTED, 9)]
    rows += [(3, 101, REJECTED, 9), (3, 102, LIKED, 1), (4, 101, LIKED, 0), (1, 107.5, REJECTED, 0)]
    events, anchors = world(*rows)
    coverage = target_coverage(events, anchors, neighbours_of({9: [1]}), CODES, tops=(1, 2), resamples=50)
    values = {target: [coverage["shares"][target][top]["value"] for top in ("top 1", "top 2")] for target in TARGETS}
    assert values == {
        "next negative": [1 / 4, 1 / 4],
        "window": [1 / 4, 2 / 4],
        "window and neighbours": [2 / 4, 3 / 4],
    }
    assert coverage["lookback_days"] == 60
    assert coverage["half_life_days"] == 14


def test_who_has_no_interests_is_not_covered_but_counts() -> None:
    rows = [(0, 90, REJECTED, 0), (0, 101, REJECTED, 0), (1, 10, REJECTED, 0), (1, 101, REJECTED, 0)]
    shares = target_coverage(*world(*rows), neighbours_of({}), CODES, resamples=50)["shares"]
    assert {share["value"] for tops in shares.values() for share in tops.values()} == {0.5}


def test_intervals_resample_users() -> None:
    """Half of 40 users are covered: the interval of the mean is that of 40 coins, whatever the anchors of each."""
    rows = [row for user in range(40) for row in ((user, 90, REJECTED, 0), (user, 101, REJECTED, user % 2 * 9))]
    events, anchors = world(*rows)
    repeated = anchors.take(np.repeat(np.arange(40), 10))
    share = target_coverage(events, repeated, neighbours_of({}), CODES, resamples=500)["shares"]["window"]["top 1"]
    assert share["value"] == 0.5
    # Standard deviation .079: 1.96 of them on each side.
    assert share["low"] == pytest.approx(0.345, abs=0.04)
    assert share["high"] == pytest.approx(0.655, abs=0.04)
