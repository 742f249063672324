"""What became of items that a user had not met, against a loop."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.feedback.anchors import served_anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.outcomes import first_meetings

EVENT = st.tuples(st.integers(0, 3), st.integers(-4, 6), st.integers(0, 2), st.integers(0, 6))


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENT, min_size=1, max_size=60), st.integers(0, 5))
def test_first_meetings_equal_a_loop(rows, end):
    rows.sort(key=lambda row: row[:2])
    users, times, kinds, items = (np.array(part) for part in zip(*rows, strict=True))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=4))))
    events = Events(pa.array(list("abcd")), offsets, items.astype(np.int32), times, kinds.astype(np.int8))
    anchors = served_anchors(events, 0, 0, 1, end)
    outcomes = first_meetings(events, anchors)
    expected = []
    for place, user in enumerate(anchors.users.tolist()):
        known = {i for u, t, _, i in rows if u == user and t <= 0}
        for item in range(7):
            said = {k for u, t, k, i in rows if u == user and 0 < t <= end and i == item}
            if said and item not in known:
                # A like outweighs a rejection, and either being shown.
                kind = LIKED if LIKED in said else REJECTED if REJECTED in said else SHOWN
                expected.append((place, item, kind))
    found = list(zip(outcomes.anchors.tolist(), outcomes.items.tolist(), outcomes.kinds.tolist(), strict=True))
    assert found == expected
    assert len(outcomes) == len(expected)
    assert (outcomes.items.dtype, outcomes.kinds.dtype) == (np.int32, np.int8)
    rejected = outcomes.take(outcomes.kinds == REJECTED)
    assert list(zip(rejected.anchors.tolist(), rejected.items.tolist(), strict=True)) == [
        row[:2] for row in expected if row[2] == REJECTED
    ]


def test_nothing_becomes_of_anything_without_anchors_or_without_a_window():
    events = Events(
        pa.array(["a"]), np.array([0, 2]), np.array([3, 4], np.int32), np.array([1, 2]), np.array([0, 1], np.int8)
    )
    assert len(first_meetings(events, served_anchors(events, 2, 0, 1))) == 0
    assert len(first_meetings(events, served_anchors(events, 0, 0, 1, 5))) == 0  # nobody has a past
