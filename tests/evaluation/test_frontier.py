"""Catch at equal false_block and FHR at equal FPH: paper values, brute force, and intervals against a known truth."""

from __future__ import annotations

import dataclasses
from itertools import chain
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from conrec.blocklist.fitting import _calibrating
from conrec.evaluation import assemble, metrics
from conrec.evaluation import frontier as module
from conrec.evaluation.compare import comparisons
from conrec.evaluation.document import Group
from conrec.evaluation.frontier import (
    by_rank,
    catch_at_false_block,
    catch_curve,
    catch_difference,
    frontier_difference,
)
from conrec.evaluation.measured import Measured
from conrec.evaluation.rows import Predictions, Row
from conrec.evaluation.systems import COUNTED, FULL
from conrec.evaluation.world import World
from conrec.ragged import Ragged


def ragged(rows: list[list[int]]) -> Ragged:
    values = np.array(list(chain.from_iterable(rows)), np.int32)
    return Ragged.from_lengths(values, np.array([len(row) for row in rows]))


def wants(negatives: list[list[int]], positives: list[list[int]]) -> SimpleNamespace:
    return SimpleNamespace(future_negatives=ragged(negatives), future_positives=ragged(positives))


def world() -> tuple[np.ndarray, np.ndarray, SimpleNamespace]:
    """Four likes to come and five rejections; by score: N N P N+P(tied) N P, and item 9 is liked but not predicted.

    false_block: 0, 0, 1/4, 2/4, 2/4, 3/4; catch: 1/5, 2/5, 2/5, 3/5, 4/5, 4/5; item 8 is rejected but not predicted.
    """
    items = np.array([[0, 1, 2, 7], [3, 4, 5, -1], [6, 7, -1, -1]], np.int32)
    scores = np.array(
        [[0.9, 0.7, 0.5, 0.99], [0.8, 0.6, 0.6, -np.inf], [0.4, 0.3, -np.inf, -np.inf]],
        np.float32,
    )
    return items, scores, wants([[0, 2], [3, 5, 8], []], [[1], [4], [6, 9]])


@pytest.mark.parametrize(
    ("limit", "catch"), [(0, 0.4), (0.24, 0.4), (0.25, 0.4), (0.49, 0.4), (0.5, 0.8), (0.75, 0.8), (1, 0.8)]
)
def test_catch_is_the_largest_within_the_limit(limit, catch) -> None:
    items, scores, wanted = world()
    figure = catch_at_false_block(items, scores, wanted, np.arange(3), 50, 0, limit=limit)
    assert figure["value"] == pytest.approx(catch)
    assert catch_curve(items, scores, wanted, np.array([limit]))[0] == pytest.approx(catch)


def test_ties_are_blocked_together() -> None:
    """A rejection tied with a like cannot be caught without losing the like."""
    wanted = wants([[0], [2]], [[1], [3]])
    items, scores = np.array([[0, 1], [2, 3]], np.int32), np.array([[0.5, 0.5], [0.4, 0.3]])
    np.testing.assert_allclose(catch_curve(items, scores, wanted, np.array([0.0, 0.49, 0.5, 1.0])), [0, 0, 1, 1])
    assert catch_at_false_block(items, scores, wanted, np.arange(2), 10, 0, limit=0.49)["value"] == 0


def test_padding_and_predictions_nobody_reacts_to_change_nothing() -> None:
    items, scores, wanted = world()
    wide = np.concatenate([items, np.full((3, 1), 11), np.full((3, 1), -1)], axis=1).astype(np.int32)
    wide_scores = np.concatenate([scores, [[2.0], [0.55], [0.0]], np.full((3, 1), 99.0)], axis=1)
    grid = np.linspace(0, 1, 21)
    np.testing.assert_array_equal(
        catch_curve(items, scores, wanted, grid), catch_curve(wide, wide_scores, wanted, grid)
    )


def test_rates_are_pooled_over_anchors_not_averaged() -> None:
    """User 0 has one rejection and user 1 three; catching user 0's is a quarter, not half."""
    wanted = wants([[0], [1, 2, 3]], [[4], [4]])
    figure = catch_at_false_block(np.array([[0], [-1]]), np.array([[1.0], [-np.inf]]), wanted, np.arange(2), 10, 0)
    assert figure["value"] == 0.25


def test_a_limit_that_rounds_below_a_whole_number_still_allows_it() -> None:
    """29 % of 100 likes are 29, although .29 x 100 is a little less in floating point."""
    assert 0.29 * 100 < 29
    items = np.arange(101, dtype=np.int32)[None]
    scores = -np.arange(101.0)[None]
    wanted = wants([[29]], [[item for item in range(101) if item != 29]])
    assert catch_curve(items, scores, wanted, np.array([0.29, 0.28]))[0] == 1
    assert catch_at_false_block(items, scores, wanted, np.zeros(1, int), 5, 0, limit=0.29)["value"] == 1
    assert catch_at_false_block(items, scores, wanted, np.zeros(1, int), 5, 0, limit=0.28)["value"] == 0


def test_an_oracle_catches_everything_and_an_inverted_oracle_nothing() -> None:
    items = np.tile(np.arange(4, dtype=np.int32), (3, 1))
    wanted = wants([[0, 1]] * 3, [[2, 3]] * 3)
    scores = np.tile([4.0, 3.0, 2.0, 1.0], (3, 1))
    users = np.arange(3)
    assert catch_at_false_block(items, scores, wanted, users, 50, 0) == {"value": 1, "low": 1, "high": 1}
    assert catch_at_false_block(items, -scores, wanted, users, 50, 0) == {"value": 0, "low": 0, "high": 0}


def test_nothing_to_block_is_undefined_and_nothing_predicted_is_zero() -> None:
    items, scores, _ = world()
    users = np.arange(3)
    for wanted in (wants([[0], [], []], [[], [], []]), wants([[], [], []], [[1], [], []])):
        assert np.isnan(list(catch_at_false_block(items, scores, wanted, users, 10, 0).values())).all()
        assert np.isnan(catch_curve(items, scores, wanted, np.array([0.1]))).all()
    empty = np.full((3, 2), -1, np.int32)
    figure = catch_at_false_block(empty, np.full((3, 2), -np.inf), world()[2], np.zeros(3, int), 10, 0)
    assert figure == {"value": 0, "low": 0, "high": 0}


def test_predictions_that_cannot_be_measured_are_refused() -> None:
    items, scores, wanted = world()
    users = np.arange(3)
    with pytest.raises(ValueError, match="one row per anchor"):
        catch_at_false_block(items[:2], scores[:2], wanted, users, 10, 0)
    with pytest.raises(ValueError, match="one row per anchor"):
        catch_at_false_block(items, scores[:, :2], wanted, users, 10, 0)
    with pytest.raises(ValueError, match="one row per anchor"):
        catch_at_false_block(items, scores, wanted, users[:2], 10, 0)
    with pytest.raises(ValueError, match="anchor 1 is predicted an item twice"):
        catch_at_false_block(np.where(items == 4, 3, items), scores, wanted, users, 10, 0)
    with pytest.raises(ValueError, match="anchor 0 has a prediction whose score is NaN"):
        catch_at_false_block(items, np.where(items == 2, np.nan, scores), wanted, users, 10, 0)
    padded = catch_at_false_block(items, np.where(items < 0, np.nan, scores), wanted, users, 10, 0, limit=1)
    assert padded["value"] == pytest.approx(0.8), "scores of padding are not read"


def random_world(rng, anchors: int = 30) -> tuple[np.ndarray, np.ndarray, SimpleNamespace, np.ndarray]:
    items = np.argsort(rng.random((anchors, 12)), axis=1)[:, :8].astype(np.int32)
    items[rng.random(items.shape) < 0.1] = -1
    scores = np.where(items >= 0, rng.integers(0, 30, items.shape) / 30, -np.inf).astype(np.float32)
    chosen = [[np.flatnonzero(rng.random(12) < 0.25).tolist() for _ in range(anchors)] for _ in range(2)]
    return items, scores, wants(*chosen), rng.integers(0, anchors // 2, anchors)


def catch_by_hand(items, scores, wanted, rows, limit) -> float:
    """Tries every threshold on the anchors `rows`, which may repeat."""
    blocked = [(score, row, item) for row in rows for score, item in zip(scores[row], items[row], strict=True)]
    liked = sum(len(wanted.future_positives[row]) for row in rows)
    rejected = sum(len(wanted.future_negatives[row]) for row in rows)
    best = 0
    for threshold in np.unique(scores[np.isfinite(scores)]):
        above = [(row, item) for score, row, item in blocked if score >= threshold]
        if sum(item in wanted.future_positives[row] for row, item in above) <= limit * liked + 1e-9:
            best = max(best, sum(item in wanted.future_negatives[row] for row, item in above))
    return best / rejected


@pytest.mark.long
@pytest.mark.parametrize("chunk", [4_000_000, 31, 3])
def test_catch_equals_trying_every_threshold_in_every_resample(chunk, monkeypatch) -> None:
    """The interval's ends are those of resamples of whole users, each with a threshold of its own."""
    rng = np.random.default_rng(0)
    for seed in range(2):
        items, scores, wanted, users = random_world(rng)
        limits = np.array([0.0, 0.1, 0.3, 0.9])
        by_hand = [catch_by_hand(items, scores, wanted, range(len(items)), limit) for limit in limits]
        np.testing.assert_allclose(catch_curve(items, scores, wanted, limits), by_hand)

        monkeypatch.setattr(metrics, "_CHUNK", 4_000_000)
        names, place = np.unique(users, return_inverse=True)
        weights = next(metrics.user_weights(len(names), 30, seed))
        drawn = [
            catch_by_hand(items, scores, wanted, np.repeat(np.arange(len(items)), column[place].astype(int)), 0.3)
            for column in weights.T
        ]
        monkeypatch.setattr(module, "_CHUNK", chunk)
        monkeypatch.setattr(metrics, "_CHUNK", chunk)
        figure = catch_at_false_block(items, scores, wanted, users, 30, seed, limit=0.3)
        assert figure["low"] == pytest.approx(np.percentile(drawn, 2.5, method="lower"))
        assert figure["high"] == pytest.approx(np.percentile(drawn, 97.5, method="higher"))


def test_a_resample_that_reached_its_limit_does_not_end_the_others(monkeypatch) -> None:
    """Read one score at a time: user 0's like comes first, user 1's rejection last."""
    monkeypatch.setattr(module, "_CHUNK", 2)
    items, scores = np.array([[0, 1], [1, -1]], np.int32), np.array([[0.9, 0.5], [0.5, -np.inf]])
    pool = module._Pool.of(items, scores, wants([[1], [1]], [[0], [0]]), np.arange(2))
    np.testing.assert_array_equal(module._catches(pool, np.eye(2), 0.0), [0, 1])


def test_weights_draw_as_many_users_as_there_are() -> None:
    weights = np.concatenate(list(metrics.user_weights(50, 300, 0)), axis=1)
    assert weights.shape == (50, 300)
    assert (weights.sum(axis=0) == 50).all()
    assert weights.mean(axis=1) == pytest.approx(1, abs=0.25)
    # A multinomial share of users that is left out: (1 - 1/50)^50 = .364.
    assert (weights == 0).mean() == pytest.approx(0.364, abs=0.02)


def test_rank_is_an_order_across_anchors() -> None:
    items = np.array([[4, 2, -1], [7, -1, -1]], np.int32)
    np.testing.assert_array_equal(by_rank(items), [[0, -1, -np.inf], [0, -np.inf, -np.inf]])


def test_difference_and_ratio_on_paper() -> None:
    """All users are alike, so every resample says the same: ours catches three of four, theirs two."""
    users = np.arange(10)
    wanted = wants([[0, 1, 2, 3]] * 10, [[4]] * 10)
    scores = np.tile([4.0, 3.0, 2.0, 1.0, 0.0], (10, 1))
    ours = np.tile(np.array([0, 1, 2, 4, 3], np.int32), (10, 1))
    theirs = np.tile(np.array([0, 1, 4, 2, 3], np.int32), (10, 1))
    found = catch_difference([(ours, scores)], [(theirs, scores)], wanted, users, 50, 0)
    assert found["difference"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert found["ratio"] == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_the_better_ordering_of_each_system_counts() -> None:
    """User 1's scores are all above user 0's: by score the like of user 1 comes first, by rank only third."""
    wanted = wants([[0, 1], [2, 3]], [[5], [5]])
    items = np.array([[0, 1, 5], [2, 3, 5]], np.int32)
    scores = np.array([[0.3, 0.2, 0.1], [0.9, 0.8, 0.7]])
    users = np.arange(2)
    by_score, ranked = (items, scores), (items, by_rank(items))
    assert catch_at_false_block(*by_score, wanted, users, 10, 0)["value"] == 0.5
    assert catch_at_false_block(*ranked, wanted, users, 10, 0)["value"] == 1
    for orderings in ([by_score, ranked], [ranked, by_score], [ranked]):
        found = catch_difference(orderings, [by_score], wanted, users, 10, 0)
        assert found["difference"]["value"] == 0.5
        assert found["ratio"]["value"] == 2
        assert catch_difference([by_score], orderings, wanted, users, 10, 0)["difference"]["value"] == -0.5


def test_a_system_does_not_differ_from_itself_in_any_resample() -> None:
    items, scores, wanted, users = random_world(np.random.default_rng(5))
    found = catch_difference([(items, scores)], [(items, scores)], wanted, users, 200, 0, limit=0.2)
    assert found["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["ratio"] == {"value": 1, "low": 1, "high": 1}
    alone = catch_at_false_block(items, scores, wanted, users, 200, 0, limit=0.2)
    assert alone["high"] > alone["low"]


def normal_world(rng, users: int, advantage: float, width: int = 5):
    """Two anchors a user, five likes N(0, 1) and five rejections N(advantage, 1), shifted alike by user N(0, 1/4)."""
    anchors = 2 * users
    items = np.tile(np.arange(2 * width, dtype=np.int32), (anchors, 1))
    scores = rng.normal(size=items.shape) + np.repeat(rng.normal(0, 0.5, users), 2)[:, None]
    scores[:, :width] += advantage
    wanted = wants([list(range(width))] * anchors, [list(range(width, 2 * width))] * anchors)
    return items, scores, wanted, np.repeat(np.arange(users), 2)


@pytest.mark.long
def test_intervals_of_catch_cover_the_truth_at_about_the_nominal_rate() -> None:
    """200 worlds of 100 users: the threshold is a quantile of few likes, and an interval that took it for known
    would be too narrow.
    """
    limit, spread = 0.05, np.sqrt(1.25)
    truth = 1 - NormalDist(1.5, spread).cdf(NormalDist(0, spread).inv_cdf(1 - limit))
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        figure = catch_at_false_block(*normal_world(rng, 100, 1.5), resamples=200, seed=seed, limit=limit)
        covered += figure["low"] <= truth <= figure["high"]
    # Binomial(200, .95) lies in here with probability above .999; the percentile interval loses a point or two.
    assert 178 <= covered <= 199


def rates(fhr: list[float], fph: list[float]) -> dict[str, np.ndarray]:
    return {"FHR": np.array(fhr, float), "FPH": np.array(fph, float)}


def at_rate(fph: float, fhr: float, size: int = 10) -> dict[str, np.ndarray]:
    """Values of anchors that are all alike, so that every resample says the same."""
    return rates([fhr] * size, [fph] * size)


def at_equal_harm(points, theirs, users, resamples: int, seed: int, halves=None) -> dict:
    """A frontier at the FPH of a system of one setting; users of even numbers are one half."""
    halves = users % 2 == 0 if halves is None else halves
    return frontier_difference(points, [theirs], theirs, users, halves, resamples, seed)


@pytest.mark.parametrize(
    ("points", "at", "ours"),
    [
        ([(0.2, 0.4), (0.4, 0.6)], 0.3, 0.5),  # halfway between
        ([(0.4, 0.6), (0.2, 0.4)], 0.3, 0.5),  # in whatever order
        ([(0.2, 0.4), (0.4, 0.6)], 0.2, 0.4),  # on a point
        ([(0.2, 0.4), (0.4, 0.6)], 0.4, 0.6),
        ([(0.2, 0.4), (0.4, 0.6)], 0.1, 0.2),  # half of the users dropped
        ([(0.2, 0.4), (0.4, 0.6)], 0.0, 0.0),
        ([(0.2, 0.4), (0.4, 0.6)], 0.9, 0.6),  # beyond the last point
        ([(0.2, 0.4), (0.3, 0.1), (0.4, 0.6)], 0.3, 0.5),  # a point below a line does not count
        ([(0.2, 0.4), (0.3, 0.55), (0.4, 0.6)], 0.3, 0.55),  # one above it does
        ([(0.2, 0.4), (0.4, 0.3)], 0.4, 0.3),  # more harm for less
        ([(0.2, 0.4), (0.4, 0.3)], 0.6, 0.3),
        ([(0.2, 0.4), (0.2, 0.5)], 0.2, 0.5),  # equal harm: the better one
        ([(0.2, 0.4), (0.2, 0.5)], 0.7, 0.5),
        ([(0.1, 0.1), (0.2, 0.4)], 0.1, 0.2),  # below the line from (0, 0)
        ([(0.0, 0.3), (0.2, 0.4)], 0.1, 0.35),  # harmless and yet of use
        ([(0.0, 0.3)], 0.0, 0.3),
        ([(0.5, 0.5)], 0.25, 0.25),
    ],
)
def test_the_frontier_is_read_off_as_on_paper(points, at, ours) -> None:
    found = at_equal_harm([at_rate(*point) for point in points], at_rate(at, 0.25), np.arange(10), 20, 0)
    assert (found["FPH"], found["FHR"]) == pytest.approx((at, 0.25))
    assert found["ours"] == pytest.approx(ours)
    assert found["difference"] == pytest.approx(dict.fromkeys(("value", "low", "high"), ours - 0.25), abs=1e-12)
    assert found["ratio"] == pytest.approx(dict.fromkeys(("value", "low", "high"), ours / 0.25), abs=1e-12)


def test_means_are_over_the_anchors_that_define_a_measure() -> None:
    nan = np.nan
    ours = rates([1, 1, 0, nan] * 2, [nan, 1, 0, 0] * 2)
    theirs = rates([1, 0, 0, nan] * 2, [nan, 1, 0, 0] * 2)
    found = at_equal_harm([ours], theirs, np.arange(8), 50, 0, halves=np.repeat([True, False], 4))
    assert (found["FPH"], found["FHR"], found["ours"]) == pytest.approx((1 / 3, 1 / 3, 2 / 3))
    assert found["ratio"]["value"] == pytest.approx(2)


def test_a_frontier_through_the_other_system_does_not_differ_from_it() -> None:
    rng = np.random.default_rng(0)
    theirs = rates(rng.random(200) < 0.4, rng.random(200) < 0.3)
    users = np.repeat(np.arange(100), 2)
    found = at_equal_harm([theirs], theirs, users, 300, 0)
    assert found["difference"] == pytest.approx({"value": 0, "low": 0, "high": 0}, abs=1e-12)
    assert found["ratio"] == pytest.approx({"value": 1, "low": 1, "high": 1})


def test_the_place_on_the_frontier_moves_with_the_resample() -> None:
    """Both systems hit in FHR exactly where they hit in FPH, so any resample's frontier, the line from (0, 0) with
    slope 2, meets the other's slope 1 at a ratio of 2, wherever the other's FPH falls.
    """
    rng = np.random.default_rng(1)
    harmed = rng.random(300) < 0.3
    theirs = rates(harmed / 2, harmed)
    ours = rates(harmed, harmed)
    found = at_equal_harm([ours], theirs, np.arange(300), 200, 0)
    assert found["ratio"] == pytest.approx({"value": 2, "low": 2, "high": 2})
    assert found["difference"]["high"] - found["difference"]["low"] > 0.02


def test_users_are_resampled_whole() -> None:
    values = rates(np.repeat([0, 1] * 10, 50), np.repeat([1, 0] * 10, 50))
    flat = at_rate(0.5, 0.5, 1000)
    halves = np.repeat(np.arange(20) // 2 % 2 == 0, 50)
    by_user = at_equal_harm([values], flat, np.repeat(np.arange(20), 50), 500, 0, halves)["difference"]
    by_anchor = at_equal_harm([values], flat, np.arange(1000), 500, 0, halves)["difference"]
    assert by_user["high"] - by_user["low"] > 4 * (by_anchor["high"] - by_anchor["low"])


def test_other_anchors_and_no_points_are_refused() -> None:
    with pytest.raises(ValueError, match="a frontier needs a point"):
        at_equal_harm([], at_rate(0.1, 0.1), np.arange(10), 10, 0)
    with pytest.raises(ValueError, match="a frontier needs a point"):
        frontier_difference([at_rate(0.1, 0.1)], [], at_rate(0.1, 0.1), np.arange(10), np.arange(10) < 5, 10, 0)
    other = rates([np.nan] + [0.1] * 9, [0.1] * 10)
    with pytest.raises(ValueError, match="FHR is defined for other anchors"):
        at_equal_harm([at_rate(0.1, 0.1), other], at_rate(0.1, 0.1), np.arange(10), 10, 0)
    with pytest.raises(ValueError, match="FPH is defined for other anchors"):
        at_equal_harm([at_rate(0.1, 0.1, 9)], rates([0.1] * 9, [0.1] * 10), np.arange(10), 10, 0)


def test_nobody_likes_anything_is_undefined() -> None:
    found = at_equal_harm([at_rate(np.nan, 0.1)], at_rate(np.nan, 0.1), np.arange(10), 10, 0)
    assert np.isnan([found["FPH"], found["ours"], *found["ratio"].values()]).all()


def test_intervals_of_the_frontier_cover_the_truth_at_about_the_nominal_rate() -> None:
    """200 worlds of 120 users with rates of their own, one to three anchors each. In truth the frontier through
    (.2, .3) and (.5, .6) is at .4 where the other system has (.3, .35): the difference is .05, the ratio 8/7.
    """
    rng = np.random.default_rng(2)
    covered = {"difference": 0, "ratio": 0}
    for seed in range(200):
        users = np.repeat(np.arange(120), rng.integers(1, 4, 120))

        def measured(fph: float, fhr: float, users=users) -> dict[str, np.ndarray]:
            hits = [rng.random(len(users)) < rng.beta(2 * mean, 2 - 2 * mean, 120)[users] for mean in (fhr, fph)]
            return rates(*hits)

        found = at_equal_harm([measured(0.2, 0.3), measured(0.5, 0.6)], measured(0.3, 0.35), users, 200, seed)
        for name, truth in (("difference", 0.05), ("ratio", 8 / 7)):
            covered[name] += found[name]["low"] <= truth <= found[name]["high"]
    # Binomial(200, .95) lies in here with probability above .999; the percentile interval loses a point or two.
    assert all(178 <= count <= 199 for count in covered.values()), covered


def test_the_users_who_choose_a_setting_are_not_those_it_is_read_on() -> None:
    """One setting is better on the one half, the other on the other: the best of both is always the better one where
    it is chosen and the worse one where it is read.
    """
    half = np.repeat([True, False], 10)
    harm = np.tile([0.2], 20)
    first, second = (rates(np.where(lucky, 0.6, 0.2), harm) for lucky in (half, ~half))
    found = at_equal_harm([first, second], rates(np.full(20, 0.3), harm), np.arange(20), 50, 0, half)
    assert found["ours"] == pytest.approx(0.2)
    assert found["difference"] == pytest.approx(dict.fromkeys(("value", "low", "high"), -0.1), abs=1e-12)


def test_a_rival_with_settings_is_a_frontier_by_the_same_code() -> None:
    """The same settings on both sides do not differ anywhere, and a rival's other settings count at its harm."""
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(60), 2)
    points = [rates(rng.random(120) < 0.3 + place, rng.random(120) < place) for place in (0.1, 0.3, 0.5)]
    for at in points:
        found = frontier_difference(points, points, at, users, users % 3 == 0, 100, 0)
        assert found["difference"] == {"value": 0, "low": 0, "high": 0}
        assert found["ours"] == found["FHR"] and found["FPH"] == pytest.approx(at["FPH"].mean())
    line = [at_rate(0.2, 0.4), at_rate(0.3, 0.2), at_rate(0.4, 0.6)]
    found = frontier_difference([at_rate(0.3, 0.5)], line, line[1], np.arange(10), np.arange(10) < 5, 20, 0)
    assert (found["FHR"], found["ours"]) == pytest.approx((0.5, 0.5))


def read_by_hand(points: list[tuple[float, float]], read: list[tuple[float, float]], at: float) -> float:
    """The points that lie above every line between two others, or (0, 0) and another, where they were chosen; then
    straight lines between them where they are read.
    """
    corners = [(0.0, 0.0)]
    every = [(0.0, 0.0), *points]
    for point, there in zip(points, read, strict=True):
        others = [other for other in every if other != point]
        below = any(
            left[0] <= point[0] <= right[0]
            and left[1] + (point[0] - left[0]) * (right[1] - left[1]) / (right[0] - left[0]) >= point[1]
            for left in others
            for right in others
            if left[0] < right[0]
        ) or any(other[0] == point[0] and other[1] >= point[1] for other in others)
        corners += [] if below else [there]
    x, y = zip(*sorted(corners), strict=True)
    return float(np.interp(at, x, y))


def frontier_by_hand(points, at, users, halves, weights) -> tuple[float, float]:
    """FHR of the frontier and of the other system, with each user counted `weights` times."""
    total = mine = other = 0.0

    def place(values, half) -> tuple[float, float]:
        pairs = []
        for name in ("FPH", "FHR"):
            known = half & ~np.isnan(values[name])
            pairs.append(np.average(values[name][known], weights=weights[users[known]]))
        return pairs[0], pairs[1]

    for chosen_on, half in ((halves, ~halves), (~halves, halves)):
        fph, fhr = place(at, half)
        size = weights[users[half & ~np.isnan(at["FHR"])]].sum()
        chosen, there = [place(values, chosen_on) for values in points], [place(values, half) for values in points]
        mine += size * read_by_hand(chosen, there, fph)
        other += size * fhr
        total += size
    return mine / total, other / total


def test_the_frontier_equals_one_by_hand_in_every_resample() -> None:
    rng = np.random.default_rng(4)
    for seed in range(3):
        users = rng.integers(0, 25, 90)
        halves = users % 3 == 0

        def measured(mean: float, users=users) -> dict[str, np.ndarray]:
            # No two points of equal FPH or FHR.
            return rates(rng.uniform(0, 0.2 + mean, len(users)), rng.uniform(0, mean, len(users)))

        points, at = [measured(mean) for mean in (0.1, 0.25, 0.4, 0.55, 0.7)], measured(0.35)
        for name, share in (("FPH", 0.2), ("FHR", 0.1)):
            unknown = rng.random(90) < share
            for values in (*points, at):
                values[name][unknown] = np.nan
        found = at_equal_harm(points, at, users, 40, seed, halves)
        mine, other = frontier_by_hand(points, at, users, halves, np.ones(25))
        assert (found["ours"], found["FHR"]) == pytest.approx((mine, other))
        names, place = np.unique(users, return_inverse=True)
        weights = next(metrics.user_weights(len(names), 40, seed))
        drawn = [frontier_by_hand(points, at, place, halves, column) for column in weights.T]
        differences = [mine - other for mine, other in drawn]
        assert found["difference"]["low"] == pytest.approx(np.percentile(differences, 2.5, method="lower"))
        assert found["difference"]["high"] == pytest.approx(np.percentile(differences, 97.5, method="higher"))


def test_many_settings_are_no_advantage_on_users_that_did_not_choose_them() -> None:
    """In truth every setting has as many hits as harms, like the other system: a frontier through them is at its FHR.
    The best of ten settings on the users that it is read on is above it in most worlds, by luck alone.
    """
    rng = np.random.default_rng(5)
    users, worlds = np.arange(300), 60
    halves = users % 2 == 0
    differences, lucky, surely = [], [], 0
    for seed in range(worlds):

        def measured(mean: float) -> dict[str, np.ndarray]:
            return rates(rng.random(300) < mean, rng.random(300) < mean)

        points, at = [measured(mean) for mean in np.linspace(0.2, 0.4, 10)], measured(0.3)
        found = at_equal_harm(points, at, users, 100, seed, halves)
        differences.append(found["difference"]["value"])
        surely += found["difference"]["low"] > 0
        x, y = (np.array([[values[name].mean() for values in points]]) for name in ("FPH", "FHR"))
        corners = module._corners(x, y)
        lucky.append(float(module._read(x, y, corners, np.array([at["FPH"].mean()]))[0] - at["FHR"].mean()))
    error = np.std(differences) / np.sqrt(worlds)
    assert abs(np.mean(differences)) < 2.6 * error
    # Binomial(60, .025) lies below with probability .998.
    assert surely <= 5
    assert np.mean(lucky) > 4 * np.std(lucky) / np.sqrt(worlds), "the trial can tell"


def test_a_half_without_users_says_nothing() -> None:
    for halves in (np.ones(10, bool), np.zeros(10, bool)):
        found = at_equal_harm([at_rate(0.2, 0.4)], at_rate(0.2, 0.3), np.arange(10), 10, 0, halves)
        assert found["FPH"] == pytest.approx(0.2)
        assert np.isnan([found["FHR"], found["ours"], *found["difference"].values(), *found["ratio"].values()]).all()


def world_of(users: int, anchors: np.ndarray, **parts) -> World:
    """Anchors of users that are named by numbers, without anything else."""
    names = pa.array([f"user{number}" for number in range(users)])
    events = SimpleNamespace(users=names)
    empty = dict.fromkeys(("config", "items", "measured", "targets", "histories", "excluded"))
    return World(**(empty | parts | {"events": events, "anchors": SimpleNamespace(users=anchors)}))


def test_a_user_stays_in_one_half_whatever_anchors_are_measured() -> None:
    drawn = np.random.default_rng(6).integers(0, 2000, 5000)
    halves = world_of(2000, np.arange(2000)).halves
    np.testing.assert_array_equal(world_of(2000, drawn).halves, halves[drawn])
    assert halves.mean() == pytest.approx(0.5, abs=0.05)


def test_the_half_that_calibrated_is_in_both_halves_alike() -> None:
    anchors = SimpleNamespace(users=np.arange(2000))
    world = world_of(2000, anchors.users)
    assert world.halves[_calibrating(world.events, anchors)].mean() == pytest.approx(0.5, abs=0.06)


def test_a_row_that_is_one_setting_of_a_system_is_compared_as_its_frontier() -> None:
    """The score without a policy at the reach that is served, among all its reaches, which here are those of ours."""
    rng = np.random.default_rng(7)
    settings = SimpleNamespace(evaluation=SimpleNamespace(resamples=30), seed=0)
    nothing = Predictions.empty(80, 1)
    world = world_of(80, np.arange(80), config=settings, targets=wants([[0]] * 80, [[1]] * 80))

    def measured(name: str, group: Group, place: float) -> Measured:
        values = rates(rng.random(80) < 0.2 + place, rng.random(80) < place)
        return Measured(name, group, values, nothing, None, Row(nothing))

    ours = [measured("ours", "ours", place) for place in (0.1, 0.3, 0.5)]
    table = {FULL: ours[1], COUNTED: dataclasses.replace(ours[1], name="counted", group="ablation")}
    table["floor"] = measured("floor", "floor", 0.3)
    found = comparisons(world, table, ours, {COUNTED: ours})
    assert found.keys() == {"counted", "floor"}
    assert found["counted"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert found["floor"]["FHR"] == pytest.approx(table["floor"].values["FHR"].mean())
    assert comparisons(world, table, ours, {})["counted"]["difference"]["high"] > 0


@pytest.mark.parametrize(("users", "few"), [(40, True), (400, False)])
def test_too_few_users_to_choose_a_frontier_are_said_to_be_few(users, few, monkeypatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(assemble, "warn", warned.append)
    both = ragged([[0]] * users)
    targets = SimpleNamespace(future_negatives=both, future_positives=both)
    world = world_of(users, np.arange(users), targets=targets)
    told = assemble.equal_harm(world)
    least = min(world.halves.sum(), (~world.halves).sum())
    assert f"at least {least} users" in told
    assert ("chosen by chance" in told) == few == bool(warned)
