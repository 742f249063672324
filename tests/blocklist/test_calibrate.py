"""theta keeps its promise on users it has not seen, and wastes little of what it is allowed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conrec.blocklist.calibrate import (
    Calibration,
    at_best,
    blocked_share,
    calibrate,
    least_anchors,
    smallest_theta,
)
from conrec.config import CalibrationSettings
from conrec.errors import ArtefactError
from conrec.ragged import Ragged


def one_each(values):
    return Ragged.from_lengths(np.array(values, np.float32), np.ones(len(values), np.int64))


def risk_by_hand(similarities, theta):
    return np.mean([np.mean(similarities[row] >= np.float32(theta)) for row in range(len(similarities))])


def test_the_bound_is_met_and_anything_smaller_breaks_it():
    """99 anchors, alpha .05: (99 R + 1) / 100 <= .05, so four anchors may lose their one positive."""
    values = np.arange(99) / 100
    theta = smallest_theta(one_each(values), 0.05)
    assert (np.float32(values) >= np.float32(theta)).sum() == 4
    assert theta == np.nextafter(np.float32(0.94), np.float32(1))


@pytest.mark.parametrize(("anchors", "possible"), [(98, False), (99, True)])
def test_too_few_anchors_prove_nothing(anchors, possible):
    """alpha .01 needs (0 + 1) / (n + 1) <= .01, so 99 anchors, whatever they show."""
    assert (smallest_theta(one_each([0.1] * anchors), 0.01) is not None) == possible


def test_no_theta_where_liked_items_share_the_generated_id():
    assert smallest_theta(one_each([1.0] * 50 + [0.0] * 150), 0.05) is None


def test_ties_are_blocked_together_or_not_at_all():
    theta = smallest_theta(one_each([0.5] * 10 + [0.1] * 189), 0.05)  # 9 anchors may lose theirs, 10 are tied
    assert theta == np.nextafter(np.float32(0.5), np.float32(1))


def test_shares_of_thirds_sum_to_a_whole():
    """199 anchors, alpha .01: exactly one anchor's whole risk is allowed, here three thirds."""
    lengths = np.array([3] * 199)
    similarities = Ragged.from_lengths(np.tile(np.array([0.9, 0.2, 0.2], np.float32), 199), lengths)
    similarities.values[9:] = 0.2
    theta = smallest_theta(similarities, 0.01)
    assert theta == np.nextafter(np.float32(0.2), np.float32(1))


def test_anchors_without_positives_do_not_dilute_the_risk():
    with_empty = Ragged.from_lengths(np.arange(99, dtype=np.float32) / 100, np.array([1] * 99 + [0] * 900))
    assert smallest_theta(with_empty, 0.05) == smallest_theta(one_each(np.arange(99) / 100), 0.05)


def test_theta_equals_trying_every_similarity():
    rng = np.random.default_rng(0)
    for _ in range(30):
        lengths = rng.integers(0, 4, 60)
        similarities = Ragged.from_lengths(rng.integers(0, 20, lengths.sum()).astype(np.float32) / 20, lengths)
        alpha, kept = 0.2, np.flatnonzero(lengths)
        candidates = np.nextafter(np.unique(similarities.values), np.float32(2))
        fits = [
            theta
            for theta in candidates
            if (len(kept) * risk_by_hand(similarities.take(kept), theta) + 1) / (len(kept) + 1) <= alpha
        ]
        assert smallest_theta(similarities, alpha) == min(fits)


def test_risk_control_holds_over_random_splits_and_is_nearly_attained():
    """Anchors differ in how near their likes lie to what was generated; calibrated on one part, measured on another."""
    rng = np.random.default_rng(1)
    alpha, calibration_size, test_size = 0.1, 150, 400
    risks = []
    for _ in range(400):
        size = calibration_size + test_size
        lengths = rng.integers(1, 6, size)
        nearness = np.repeat(rng.beta(2, 5, size), lengths)
        values = np.clip(nearness + rng.normal(0, 0.1, lengths.sum()), -1, 0.999).astype(np.float32)
        population = Ragged.from_lengths(values, lengths)
        order = rng.permutation(size)
        theta = smallest_theta(population.take(order[:calibration_size]), alpha)
        risks.append(blocked_share(population.take(order[calibration_size:]), [theta])[0])
    error = 3 * np.std(risks) / np.sqrt(len(risks))
    assert np.mean(risks) <= alpha + error
    assert np.mean(risks) >= alpha - 2 / calibration_size - error


def test_each_stratum_has_its_own_theta_and_small_ones_predict_nothing():
    settings = CalibrationSettings(alpha=0.05, strata=(3, 10))
    values = np.concatenate([np.full(100, 0.8), np.full(100, 0.3), np.full(5, 0.1)])
    rejections = np.concatenate([np.full(100, 2), np.full(100, 3), np.full(5, 10)])
    calibration = calibrate(one_each(values), rejections, settings)
    quiet, middle, busy = calibration.strata
    assert (quiet.min_rejections, quiet.max_rejections) == (0, 2)
    assert (busy.min_rejections, busy.max_rejections, busy.anchors, busy.theta) == (10, None, 5, None)
    assert 0.8 < quiet.theta < 0.801
    assert 0.3 < middle.theta < 0.301
    thetas = calibration.thetas(np.array([0, 2, 3, 9, 10, 99]))
    assert thetas.dtype == np.float32
    assert np.array_equal(thetas, np.float32([quiet.theta] * 2 + [middle.theta] * 2 + [np.inf] * 2))
    assert calibration.smallest == middle.theta


def test_json_has_no_infinity_and_comes_back_equal():
    settings = CalibrationSettings(alpha=0.05, strata=(3,))
    calibration = calibrate(one_each([0.2] * 100), np.zeros(100), settings)
    text = json.dumps(calibration.to_json(), allow_nan=False)
    assert Calibration.from_json(json.loads(text)) == calibration
    assert json.loads(text)["strata"][1]["theta"] is None
    with pytest.raises(ArtefactError, match="run the train stage"):
        Calibration.from_json({"alpha": 0.1})


def test_nothing_is_predicted_when_no_stratum_has_a_theta():
    calibration = calibrate(one_each([0.2] * 3), np.zeros(3), CalibrationSettings())
    assert calibration.smallest == float("inf")
    assert np.isinf(calibration.thetas(np.array([0, 5, 50]))).all()


def test_blocked_share_equals_counting():
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 5, 40)
    similarities = Ragged.from_lengths(rng.integers(-5, 10, lengths.sum()).astype(np.float32) / 10, lengths)
    thetas = np.linspace(-1.1, 1.1, 23).astype(np.float32)
    kept = similarities.take(np.flatnonzero(lengths))
    expected = [risk_by_hand(kept, theta) for theta in thetas]
    np.testing.assert_allclose(blocked_share(similarities, thetas), expected, atol=1e-12)
    assert np.isnan(blocked_share(Ragged(np.empty(0, np.float32), np.zeros(3, np.int64)), [0.5])).all()


@pytest.mark.parametrize("alpha", [0.001, 0.003, 0.01, 0.03, 1 / 3, 0.05, 0.1, 0.3, 0.5, 0.7, 0.999])
def test_the_fewest_anchors_are_those_with_which_a_theta_exists(alpha):
    least = least_anchors(alpha)
    assert smallest_theta(one_each([-1.0] * least), alpha) is not None
    assert smallest_theta(one_each([-1.0] * (least - 1)), alpha) is None


def test_what_no_policy_could_calibrate_is_known_before_there_is_one():
    """alpha .25 needs three anchors with a like: the quiet have two and one without, the active three."""
    settings = CalibrationSettings(alpha=0.25, strata=(3, 10))
    rejections, liked = np.array([1, 2, 0, 4, 5, 9]), np.array([1, 1, 0, 1, 1, 1], bool)
    best = at_best(rejections, liked, settings)
    assert [stratum.theta is None for stratum in best.strata] == [True, False, True]
    least = "validation anchors with a later like, and calibration.alpha = 0.25 needs 3"
    assert best.silent() == [f"users with 0 to 2 rejections: 2 {least}", f"users with 10 rejections or more: 0 {least}"]
    # Nothing at all can be calibrated without anchors.
    nothing = at_best(np.zeros(0, np.int64), np.zeros(0, bool), settings)
    assert nothing.overall.theta is None and nothing.smallest == np.inf and len(nothing.silent()) == 3
    # Enough anchors, and the liked items are what was generated.
    (line,) = calibrate(one_each([1.0] * 9), np.zeros(9), CalibrationSettings(alpha=0.25, strata=())).silent()
    assert "no theta keeps false blocks below calibration.alpha = 0.25 on 9 validation anchors" in line
