"""The prior of semantic IDs by hand: rejection odds, freshness, and what must not be counted."""

from __future__ import annotations

import numpy as np
import pytest

from conrec.blocklist.prior import EASE_LEAST, EASE_RIDGE, FRESHNESS_PRIOR, ODDS_PRIOR, Prior, fit_exposure, leaf_prior
from conrec.config import GenerateSettings
from conrec.ragged import Ragged

NOW = 1_700_000_000_000_000
"""The moment from which `make_events` counts days."""
ODDS = GenerateSettings(rejection_odds=2.0)
FRESH = GenerateSettings(freshness=1.5, freshness_days=1.0)


def test_odds_by_hand(world, make_events):
    """Leaf 0 holds items 0 and 9: a rejected it, b liked it; c liked leaf 2, which shares its first code.

    Leaf 1 shares it too, and is met by nobody; leaf 4 has another, and nobody met the code of leaf 6.
    """
    events = make_events(
        {
            "a": [(0, "rejected", 3), (9, "shown", 2)],
            "b": [(9, "liked", 2)],
            "c": [(2, "liked", 1), (2, "shown", 0.5)],
            "d": [(4, "shown", 1)],
        }
    )
    prior = leaf_prior(events, NOW, world.trie, ODDS)
    assert prior.shape == (9,) and prior.dtype == np.float32

    def share(said, met, said_of_code, mean):
        """Of a leaf below a code that three users met; drawn to the code, which is drawn to all."""
        code = (said_of_code + ODDS_PRIOR * mean) / (3 + ODDS_PRIOR)
        return (said + ODDS_PRIOR * code) / (met + ODDS_PRIOR) / mean

    # Of four pairs of user and ID one is a rejection, two are likes.
    assert prior[0] == pytest.approx(2 * np.log(share(1, 2, 1, 1 / 4) / share(1, 2, 2, 1 / 2)), rel=1e-5)
    assert prior[1] == pytest.approx(2 * np.log(share(0, 0, 1, 1 / 4) / share(0, 0, 2, 1 / 2)), abs=1e-6)
    assert prior[2] == pytest.approx(2 * np.log(share(0, 1, 1, 1 / 4) / share(1, 1, 2, 1 / 2)), rel=1e-5)
    assert prior[6] == pytest.approx(0, abs=1e-6)
    assert prior[0] > prior[1] > prior[2]


def test_a_user_counts_once_per_id(world, make_events):
    """Rejecting an ID again and again, or two items of it, is one user who rejects it."""
    once = make_events({"a": [(0, "rejected", 3)], "b": [(1, "shown", 3)]})
    often = make_events(
        {"a": [(0, "rejected", day) for day in (3, 2, 1)] + [(9, "rejected", 1)], "b": [(1, "shown", 3)] * 4}
    )
    np.testing.assert_array_equal(leaf_prior(often, NOW, world.trie, ODDS), leaf_prior(once, NOW, world.trie, ODDS))
    twice = make_events({"a": [(0, "rejected", 3)], "b": [(1, "shown", 3)], "c": [(1, "shown", 3)]})
    assert leaf_prior(twice, NOW, world.trie, ODDS)[1] < leaf_prior(once, NOW, world.trie, ODDS)[1]


def test_freshness_by_hand(world, make_events):
    """Six exposures, two in the last day, both of leaf 3; the moment a day ago is not recent any more."""
    events = make_events(
        {
            "a": [(3, "shown", 0.2), (3, "liked", 0.9), (4, "shown", 1.0), (4, "rejected", 5)],
            "b": [(4, "shown", 6), (5, "shown", 7)],
        }
    )
    prior = leaf_prior(events, NOW, world.trie, FRESH)
    recent, shown = np.zeros(9), np.zeros(9)
    recent[3] = 2
    shown[[3, 4, 5]] = 2, 3, 1
    expected = 1.5 * np.log((recent + FRESHNESS_PRIOR) / (shown * 2 / 6 + FRESHNESS_PRIOR))
    np.testing.assert_allclose(prior, expected, rtol=1e-5, atol=1e-7)
    assert prior[3] > 0 and prior[4] < prior[5] < 0 and prior[0] == 0
    # Every exposure counts, also several of one user; a longer notion of recent takes in the others.
    longer = leaf_prior(events, NOW, world.trie, FRESH.model_copy(update={"freshness_days": 30.0}))
    np.testing.assert_allclose(longer, np.zeros(9), atol=1e-7)


def test_both_parts_add(world, make_events):
    events = make_events({"a": [(0, "rejected", 3), (1, "shown", 0.1)], "b": [(2, "shown", 0.1)]})
    both = GenerateSettings(rejection_odds=2.0, freshness=1.5)
    parts = [leaf_prior(events, NOW, world.trie, settings) for settings in (ODDS, FRESH)]
    np.testing.assert_allclose(leaf_prior(events, NOW, world.trie, both), sum(parts), rtol=1e-5)
    assert all(part.any() for part in parts)


@pytest.mark.parametrize("settings", [ODDS, FRESH])
def test_events_after_now_are_ignored(world, make_events, settings):
    past = {"a": [(0, "rejected", 3), (1, "shown", 2)], "b": [(1, "shown", 2), (2, "liked", 0)]}
    future = {"a": [(1, "rejected", -0.001)], "b": [(0, "rejected", -1), (5, "shown", -2)]}
    known = leaf_prior(make_events(past), NOW, world.trie, settings)
    leaky = make_events({user: [*past[user], *future[user]] for user in past})
    np.testing.assert_array_equal(leaf_prior(leaky, NOW, world.trie, settings), known)
    assert not np.array_equal(leaf_prior(leaky, NOW + 3 * 86_400_000_000, world.trie, settings), known)


def test_exponents_of_zero_say_nothing(world, make_events):
    events = make_events({"a": [(0, "rejected", 3), (1, "shown", 0.2)]})
    assert leaf_prior(events, NOW, world.trie, GenerateSettings()).tolist() == [0] * 9


@pytest.mark.parametrize(
    "histories",
    [{"a": [(0, "shown", 3), (1, "shown", 2)]}, {"a": [(0, "rejected", -3)]}, {"a": []}],
    ids=["nobody says anything", "nothing before now", "no events"],
)
def test_without_rejections_or_events_the_prior_is_finite(world, make_events, histories):
    events = make_events(histories)
    assert leaf_prior(events, NOW, world.trie, ODDS).tolist() == [0] * 9
    assert np.isfinite(leaf_prior(events, NOW, world.trie, FRESH)).all()


def test_what_nobody_rejects_is_told_apart_by_likes_alone(world, make_events):
    events = make_events({"a": [(0, "liked", 3), (1, "shown", 2)], "b": [(0, "liked", 3), (1, "shown", 2)]})
    prior = leaf_prior(events, NOW, world.trie, ODDS)
    assert np.isfinite(prior).all() and prior[0] < 0 < prior[1]


def test_every_rejection_of_everything_says_nothing_about_one_id(world, make_events):
    events = make_events({user: [(item, "rejected", 3) for item in range(12)] for user in "abc"})
    np.testing.assert_allclose(leaf_prior(events, NOW, world.trie, ODDS), np.zeros(9), atol=1e-6)


def test_exposure_by_hand(world, make_events):
    """Who met leaf 0 met leaf 1: one who met 0 alone expects 1. Seen against the closed form on dense matrices."""
    histories = {user: [(0, "liked", 3), (1, "shown", 2), (9, "rejected", 1)] for user in "abc"}
    events = make_events(histories | {"d": [(2, "shown", 3)], "e": [(1, "shown", -1)]})
    settings = GenerateSettings(rejection_odds=1.0, exposure=0.5)
    prior = Prior.at(events, NOW, world.trie, settings)
    # Items 0 and 9 share leaf 0; what e meets after now is not counted.
    met = np.zeros((5, 9))
    met[:3, [0, 1]] = 1
    met[3, 2] = 1
    inverse = np.linalg.inv(met.T @ met + EASE_RIDGE * np.eye(9))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    history = np.zeros(9)
    history[[0, 4]] = 1
    asked = np.array([[1, 2, -1]])
    expected = np.log(np.maximum(history @ weights, 0) + EASE_LEAST)[[1, 2]]
    shared = leaf_prior(events, NOW, world.trie, settings)[[1, 2]]
    found = prior.scores(Ragged.from_lengths(np.array([0, 4, 0]), np.array([3])), asked)
    assert found.shape == (1, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, :2], shared + 0.5 * expected, rtol=1e-5)
    assert found[0, 0] - shared[0] > found[0, 1] - shared[1]


def test_exposure_fitted_before_is_the_same(world, make_events):
    """An evaluation fits it once for many settings."""
    events = make_events({user: [(0, "liked", 3), (item, "shown", 2)] for item, user in enumerate("abcdefgh")})
    settings = GenerateSettings(exposure=1.0)
    histories, leaves = Ragged.from_lengths(np.array([0]), np.array([1])), np.arange(9)[None]
    given = Prior.at(events, NOW, world.trie, settings, fit_exposure(events, NOW, world.trie))
    np.testing.assert_array_equal(
        given.scores(histories, leaves), Prior.at(events, NOW, world.trie, settings).scores(histories, leaves)
    )
    off = Prior.at(events, NOW, world.trie, GenerateSettings(), fit_exposure(events, NOW, world.trie))
    assert off.scores(histories, leaves).tolist() == [[0] * 9]
