"""Swing neighbours against the formula written as loops, its gate, its cap and its bounded blocks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from conrec.config import SwingSettings
from conrec.feedback import swing
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.swing import Neighbours, swing_neighbours


def events_of(rejections: list[tuple[int, int]], users: int, kind: int = REJECTED) -> Events:
    """Events of (user, item) pairs, a microsecond apart."""
    rejections = sorted(rejections, key=lambda pair: pair[0])
    rows = np.array([user for user, _ in rejections], np.int64)
    return Events(
        pa.array([f"u{user:03}" for user in range(users)]),
        np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=users)))),
        np.array([item for _, item in rejections], np.int32),
        np.arange(len(rejections)),
        np.full(len(rejections), kind, np.int8),
    )


def swing_by_loops(rejections: list[tuple[int, int]], items: int, settings: SwingSettings) -> dict:
    """(i, j) -> (score, support), the formula as it stands."""
    items_of = {user: {item for u, item in rejections if u == user} for user, _ in rejections}
    users_of = {item: {user for user, other in rejections if other == item} for item in range(items)}
    weight = {user: 1 / (settings.alpha1 + len(own)) ** settings.theta for user, own in items_of.items()}
    scores = {}
    for i in range(items):
        for j in range(items):
            common = users_of[i] & users_of[j]
            if i == j or len(common) <= settings.min_support:
                continue
            total = 0.0
            for u in common:
                for v in common:
                    if u != v:
                        total += weight[u] * weight[v] / (settings.alpha2 + len(items_of[u] & items_of[v]))
            count = sum(item == j for _, item in rejections)
            if total > 0:
                scores[i, j] = (total / count**0.5, len(common))
    return scores


def as_dict(neighbours: Neighbours) -> dict:
    return {
        (i, int(j)): (float(score), int(support))
        for i, j, score, support in zip(
            neighbours.items.rows, neighbours.items.values, neighbours.scores, neighbours.supports, strict=True
        )
    }


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5)), max_size=60),
    st.integers(0, 3),
    st.sampled_from([4, 1 << 22]),
)
@run_settings(max_examples=60, deadline=None)
def test_equals_the_formula_in_blocks_of_any_size(rejections, min_support, block):
    settings = SwingSettings(min_support=min_support, neighbours=6, alpha1=2.0, theta=0.7, alpha2=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(swing, "_BLOCK_PAIRS", block)
        patch.setattr(swing, "_BLOCK_EDGES", block)
        found = as_dict(swing_neighbours(events_of(rejections, 8), 6, settings, seed=0))
    expected = swing_by_loops(rejections, 6, settings)
    assert found.keys() == expected.keys()
    for pair, (score, support) in expected.items():
        assert found[pair][0] == pytest.approx(score, rel=1e-5)
        assert found[pair][1] == support


def test_two_users_who_share_two_items_by_hand():
    settings = SwingSettings(alpha1=2.0, theta=0.5, alpha2=1.0, min_support=1)
    found = swing_neighbours(events_of([(0, 0), (0, 1), (1, 0), (1, 1)], 2), 3, settings, seed=0)
    # w = 1/sqrt(2 + 2) = .5; both orders of the pair: 2 * .25 / (1 + 2); two rejections of the neighbour.
    assert as_dict(found)[0, 1][0] == pytest.approx(2 * 0.25 / 3 / 2**0.5)
    assert found.items[2].size == 0
    assert found.covered_share == pytest.approx(2 / 3)


def test_support_must_exceed_the_gate():
    rejections = [(user, item) for user in range(3) for item in (0, 1)]
    assert as_dict(swing_neighbours(events_of(rejections, 3), 2, SwingSettings(min_support=2), 0))
    assert not as_dict(swing_neighbours(events_of(rejections, 3), 2, SwingSettings(min_support=3), 0))


def test_one_common_user_is_no_pair():
    assert not as_dict(swing_neighbours(events_of([(0, 0), (0, 1)], 1), 2, SwingSettings(min_support=0), 0))


def test_likes_make_no_edge():
    rejections = [(user, item) for user in range(9) for item in (0, 1)]
    assert not as_dict(swing_neighbours(events_of(rejections, 9, kind=LIKED), 2, SwingSettings(min_support=0), 0))


def test_keeps_the_best_neighbours_in_order():
    pairs = {1: 6, 2: 9, 3: 3}  # common users of item 0 with each other item
    rejections = []
    for item, count in pairs.items():
        for _ in range(count):
            user = len(rejections)
            rejections += [(user, 0), (user, item)]
    users = len(rejections) + 1
    found = swing_neighbours(events_of(rejections, users), 4, SwingSettings(min_support=0, neighbours=2), 0)
    assert found.items[0].tolist() == [2, 1]
    assert np.all(np.diff(found.scores[:2]) < 0)


def test_cap_samples_users_of_an_item_and_is_reproducible():
    rejections = [(user, item) for user in range(40) for item in (0, 1)]
    settings = SwingSettings(min_support=0, max_users_per_item=10)
    first, again, other = (swing_neighbours(events_of(rejections, 40), 2, settings, seed) for seed in (1, 1, 2))
    assert as_dict(first) == as_dict(again)
    # All users weigh the same here, so that any ten of them give the formula's value for ten users.
    expected = swing_by_loops(rejections[:20], 2, settings)[0, 1][0] * (10 / 40) ** 0.5
    for found in (first, other):
        assert as_dict(found)[0, 1] == (pytest.approx(expected, rel=1e-5), 10)


def test_no_rejection_at_all():
    found = swing_neighbours(events_of([], 3), 4, SwingSettings(), 0)
    assert len(found.items) == 4
    assert found.covered_share == 0
