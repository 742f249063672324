"""The threshold keeps its promise on users it has not seen, and wastes little of what it is allowed."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.blocklist.calibrate import (
    ALPHAS,
    Calibration,
    at_best,
    blocked_share,
    calibrate,
    least_users,
    smallest_threshold,
)
from conrec.config import CalibrationSettings
from conrec.errors import ArtefactError
from conrec.ragged import Ragged

ALPHA = st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9])
SCORE = st.sampled_from([-math.inf, *(np.arange(1, 16) / 16).tolist()])
USER = st.tuples(st.integers(0, 14), st.lists(SCORE, max_size=4))
"""Rejections in the history, and the scores of what is liked later."""


def one_each(values):
    return Ragged.from_lengths(np.array(values, np.float32), np.ones(len(values), np.int64))


def rows_of(rows):
    values = np.array([score for row in rows for score in row], np.float32)
    return Ragged.from_lengths(values, np.array([len(row) for row in rows], np.int64))


def risk_by_hand(rows, threshold):
    """R_hat: the mean over users with a like of the share of their likes at or above the threshold."""
    shares = [sum(np.float32(score) >= np.float32(threshold) for score in row) / len(row) for row in rows if row]
    return sum(shares) / len(shares)


def threshold_by_hand(rows, alpha):
    """Walks every place where the risk can change, from the smallest up."""
    users = sum(bool(row) for row in rows)
    candidates = {0.0, *(float(np.nextafter(np.float32(score), np.float32(2))) for row in rows for score in row)}
    for threshold in sorted(max(candidate, 0.0) for candidate in candidates):
        if users and (users * risk_by_hand(rows, threshold) + 1) / (users + 1) <= alpha + 1e-12:
            return threshold
    return None


def test_the_bound_is_met_and_anything_smaller_breaks_it():
    """99 users, alpha .05: (99 R + 1) / 100 <= .05, so four users may lose their one like."""
    values = np.arange(99) / 100
    threshold = smallest_threshold(one_each(values), 0.05)
    assert (np.float32(values) >= np.float32(threshold)).sum() == 4
    assert threshold == np.nextafter(np.float32(0.94), np.float32(1))


@pytest.mark.parametrize(("users", "possible"), [(98, False), (99, True)])
def test_too_few_users_prove_nothing(users, possible):
    """alpha .01 needs (0 + 1) / (n + 1) <= .01, so 99 users, whatever they show."""
    assert (smallest_threshold(one_each([0.1] * users), 0.01) is not None) == possible


def test_nothing_passes_where_likes_have_the_largest_score_there_is():
    largest = np.nextafter(np.float32(1), np.float32(0))
    assert smallest_threshold(one_each([largest] * 50 + [0.1] * 150), 0.05) == 1.0


def test_everything_passes_where_no_like_would_be_listed():
    assert smallest_threshold(one_each([-np.inf] * 99), 0.01) == 0.0
    # As much as is allowed may be listed, whatever its score.
    assert smallest_threshold(one_each([-np.inf] * 96 + [0.9] * 3), 0.05) == 0.0


def test_ties_are_blocked_together_or_not_at_all():
    threshold = smallest_threshold(one_each([0.5] * 10 + [0.1] * 189), 0.05)  # 9 users may lose theirs, 10 are tied
    assert threshold == np.nextafter(np.float32(0.5), np.float32(1))


def test_shares_of_thirds_sum_to_a_whole():
    """199 users, alpha .01: exactly one user's whole risk is allowed, here three thirds."""
    lengths = np.array([3] * 199)
    scores = Ragged.from_lengths(np.tile(np.array([0.9, 0.2, 0.2], np.float32), 199), lengths)
    scores.values[9:] = 0.2
    threshold = smallest_threshold(scores, 0.01)
    assert threshold == np.nextafter(np.float32(0.2), np.float32(1))


def test_users_without_a_like_do_not_dilute_the_risk():
    with_empty = Ragged.from_lengths(np.arange(99, dtype=np.float32) / 100, np.array([1] * 99 + [0] * 900))
    assert smallest_threshold(with_empty, 0.05) == smallest_threshold(one_each(np.arange(99) / 100), 0.05)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(SCORE, max_size=4), max_size=40), ALPHA)
def test_the_threshold_equals_walking_every_one(rows, alpha):
    assert smallest_threshold(rows_of(rows), alpha) == threshold_by_hand(rows, alpha)


@settings(max_examples=60, deadline=None)
@given(st.lists(USER, max_size=60), ALPHA)
def test_strata_have_their_own_threshold_or_that_over_all_users(users, alpha):
    """At the largest alpha, which nothing holds down; the smaller ones are never below the next larger."""
    chosen = CalibrationSettings(alpha=alpha, strata=(3, 10))
    rows, rejections = [row for _, row in users], np.array([said for said, _ in users], np.int64)
    calibration = calibrate(rows_of(rows), rejections, chosen)
    ranges = [(0, 2), (3, 9), (10, None)]
    assert [(one.min_rejections, one.max_rejections) for one in calibration.strata] == ranges
    assert sorted({alpha, *ALPHAS}) == sorted([calibration.alpha, *(other.alpha for other in calibration.others)])
    held: dict[int, float] = {}
    for at in sorted({alpha, *ALPHAS}, reverse=True):
        one = calibration.at(at)
        overall = threshold_by_hand(rows, at)
        assert (one.overall.threshold, one.overall.calibrated_on) == (overall, sum(map(bool, rows)))
        for number, (stratum, (low, high)) in enumerate(zip(one.strata, ranges, strict=True)):
            own = [row for said, row in users if low <= said <= (math.inf if high is None else high)]
            expected = threshold_by_hand(own, at)
            expected = overall if expected is None else expected
            if expected is not None:
                expected = held[number] = max(expected, held.get(number, 0.0))
            assert (stratum.threshold, stratum.calibrated_on) == (expected, sum(map(bool, own)))
            if not any(own):
                assert stratum.false_block is None
            else:
                risk = 0.0 if expected is None else risk_by_hand(own, expected)
                assert stratum.false_block == pytest.approx(risk, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(USER, max_size=60), st.permutations(ALPHAS))
def test_a_smaller_alpha_never_has_a_smaller_threshold_for_anybody(users, alphas):
    rows, rejections = [row for _, row in users], np.array([said for said, _ in users], np.int64)
    calibration = calibrate(rows_of(rows), rejections, CalibrationSettings(alpha=alphas[0], strata=(3, 10)))
    everybody = np.arange(15)
    thresholds = [calibration.at(alpha).thresholds(everybody) for alpha in sorted(ALPHAS)]
    for stricter, looser in zip(thresholds, thresholds[1:], strict=False):
        assert (stricter >= looser).all()
    # What is served is no matter of which alpha was asked for first.
    for alpha in ALPHAS:
        other = calibrate(rows_of(rows), rejections, CalibrationSettings(alpha=alpha, strata=(3, 10)))
        assert np.array_equal(other.thresholds(everybody), calibration.at(alpha).thresholds(everybody))
    with pytest.raises(KeyError):
        calibration.at(0.07)


@settings(max_examples=60, deadline=None)
@given(st.lists(USER, max_size=60), st.integers(0, 2**32 - 1))
def test_no_threshold_is_smaller_than_one_that_it_is_to_keep(users, seed):
    """Other lists of the same users: another score for each like."""
    rejections = np.array([count for count, _ in users], int)
    first = rows_of([row for _, row in users])
    other = Ragged(np.random.default_rng(seed).permutation(first.values), first.offsets)
    limits = CalibrationSettings(alpha=0.3, strata=(3, 10))
    alone, least = calibrate(other, rejections, limits), calibrate(first, rejections, limits)
    both = calibrate(other, rejections, limits, at_least=least)
    for alpha in (0.3, *ALPHAS):
        parts = [one.at(alpha) for one in (both, alone, least)]
        np.testing.assert_array_equal(
            parts[0].thresholds(rejections), np.maximum(*(part.thresholds(rejections) for part in parts[1:]))
        )
    assert calibrate(first, rejections, limits, at_least=least) == least


def test_risk_control_holds_over_random_draws_and_is_nearly_attained():
    """Users differ in how much of what they like scores high; calibrated on some, measured on others."""
    rng = np.random.default_rng(1)
    alpha, calibration_size, test_size = 0.1, 150, 400
    risks = []
    for _ in range(400):
        size = calibration_size + test_size
        lengths = rng.integers(1, 6, size)
        leaning = np.repeat(rng.beta(2, 5, size), lengths)
        values = np.clip(leaning + rng.normal(0, 0.1, lengths.sum()), 1e-3, 0.999).astype(np.float32)
        values[rng.random(len(values)) < 0.3] = -np.inf  # protected by a guardrail, or beyond a cap
        population = Ragged.from_lengths(values, lengths)
        order = rng.permutation(size)
        threshold = smallest_threshold(population.take(order[:calibration_size]), alpha)
        risks.append(blocked_share(population.take(order[calibration_size:]), [threshold])[0])
    error = 3 * np.std(risks) / np.sqrt(len(risks))
    assert np.mean(risks) <= alpha + error
    assert np.mean(risks) >= alpha - 2 / calibration_size - error


def test_the_bound_holds_in_each_stratum_that_has_its_own_threshold():
    """Active users' likes score higher: one threshold for all would break their promise."""
    rng = np.random.default_rng(2)
    chosen = CalibrationSettings(alpha=0.1, strata=(5,))
    risks, shared = {False: [], True: []}, []
    for _ in range(200):
        active = rng.random(600) < 0.3
        values = rng.beta(2, np.where(active, 3, 8)).astype(np.float32)
        rejections = np.where(active, 9, 1)
        calibration = calibrate(one_each(values[:200]), rejections[:200], chosen)
        thresholds = calibration.thresholds(rejections[200:])
        for group, found in risks.items():
            mine = active[200:] == group
            found.append(np.mean(values[200:][mine] >= thresholds[mine]))
        shared.append(np.mean(values[200:][active[200:]] >= calibration.overall.threshold))
    for found in risks.values():
        assert np.mean(found) <= 0.1 + 3 * np.std(found) / np.sqrt(len(found))
    assert np.mean(shared) > 0.15


def test_a_stratum_of_few_users_takes_the_threshold_over_all():
    chosen = CalibrationSettings(alpha=0.05, strata=(3, 10))
    values = np.concatenate([np.full(100, 0.8), np.full(100, 0.3), np.full(5, 0.1)])
    rejections = np.concatenate([np.full(100, 2), np.full(100, 3), np.full(5, 10)])
    calibration = calibrate(one_each(values), rejections, chosen)
    quiet, middle, busy = calibration.strata
    assert (quiet.min_rejections, quiet.max_rejections, quiet.calibrated_on) == (0, 2, 100)
    assert (busy.min_rejections, busy.max_rejections, busy.calibrated_on) == (10, None, 5)
    assert 0.8 < quiet.threshold < 0.801
    assert 0.3 < middle.threshold < 0.301
    assert busy.threshold == calibration.overall.threshold == quiet.threshold
    assert busy.false_block == 0
    assert [stratum.users for stratum in calibration.strata] == [
        "users with 0 to 2 rejections",
        "users with 3 to 9 rejections",
        "users with 10 rejections or more",
    ]
    thresholds = calibration.thresholds(np.array([0, 2, 3, 9, 10, 99]))
    assert thresholds.dtype == np.float32
    expected = [quiet.threshold] * 2 + [middle.threshold] * 2 + [busy.threshold] * 2
    assert np.array_equal(thresholds, np.float32(expected))


def test_the_threshold_of_few_users_is_held_above_their_own_at_a_larger_alpha():
    """At .1 the busy have enough users for a threshold of their own, which is high; at .05 they have too few, and that
    of everybody lies far below."""
    values = np.concatenate([np.full(400, 0.2), np.full(12, 0.9)])
    rejections = np.concatenate([np.full(400, 1), np.full(12, 20)])
    calibration = calibrate(one_each(values), rejections, CalibrationSettings(alpha=0.05, strata=(10,)))
    assert calibration.overall.threshold < 0.3
    assert calibration.strata[1].threshold == calibration.at(0.1).strata[1].threshold > 0.9


def test_borders_of_strata_may_be_given_in_any_order_and_zero_is_none():
    values, rejections = np.linspace(0.1, 0.9, 60), np.arange(60) % 20
    one = calibrate(one_each(values), rejections, CalibrationSettings(alpha=0.1, strata=(10, 0, 3, 3)))
    assert one == calibrate(one_each(values), rejections, CalibrationSettings(alpha=0.1, strata=(3, 10)))
    alone = calibrate(one_each(values), rejections, CalibrationSettings(alpha=0.1, strata=()))
    (everybody,) = alone.strata
    assert everybody == alone.overall


def test_json_has_no_infinity_and_comes_back_equal():
    chosen = CalibrationSettings(alpha=0.05, strata=(3,))
    calibration = calibrate(one_each([0.2] * 30), np.zeros(30), chosen)
    text = json.dumps(calibration.to_json(), allow_nan=False)
    read = Calibration.from_json(json.loads(text))
    assert read == calibration and read.others == calibration.others
    assert json.loads(text)["others"][-1]["alpha"] == 0.01
    assert json.loads(text)["others"][-1]["overall"]["threshold"] is None
    for broken in ({"alpha": 0.1}, {"alpha": None}, {**json.loads(text), "overall": {"theta": 1}}):
        with pytest.raises(ArtefactError, match="it is made again"):
            Calibration.from_json(broken)


def test_nothing_is_predicted_where_there_is_no_threshold():
    calibration = calibrate(one_each([0.2] * 3), np.zeros(3), CalibrationSettings())
    assert np.isinf(calibration.thresholds(np.array([0, 5, 50]))).all()


def test_blocked_share_equals_counting():
    rng = np.random.default_rng(2)
    rows = [rng.choice([-np.inf, 0.1, 0.5, 0.9], rng.integers(0, 5)).tolist() for _ in range(40)]
    thresholds = np.linspace(0, 1.1, 23).astype(np.float32)
    expected = [risk_by_hand(rows, threshold) for threshold in thresholds]
    np.testing.assert_allclose(blocked_share(rows_of(rows), thresholds), expected, atol=1e-12)
    assert np.isnan(blocked_share(Ragged(np.empty(0, np.float32), np.zeros(3, np.int64)), [0.5])).all()


@pytest.mark.parametrize("alpha", [0.001, 0.003, 0.01, 0.03, 1 / 3, 0.05, 0.1, 0.3, 0.5, 0.7, 0.999])
def test_the_fewest_users_are_those_with_which_a_threshold_exists(alpha):
    least = least_users(alpha)
    assert smallest_threshold(one_each([-np.inf] * least), alpha) is not None
    assert smallest_threshold(one_each([-np.inf] * (least - 1)), alpha) is None


def test_what_no_policy_could_calibrate_is_known_before_there_is_one():
    """alpha .25 needs three users with a like, over all strata."""
    chosen = CalibrationSettings(alpha=0.25, strata=(3, 10))
    rejections = np.array([1, 2, 0, 4, 5])
    two = at_best(rejections, np.array([1, 0, 0, 1, 0], bool), chosen)
    assert two.silent() == "2 validation users with a later like, and calibration.alpha = 0.25 needs 3"
    assert [stratum.threshold for stratum in two.strata] == [None] * 3
    three = at_best(rejections, np.array([1, 1, 0, 0, 1], bool), chosen)
    assert three.silent() is None
    assert [stratum.threshold for stratum in three.strata] == [0.0] * 3
    nothing = at_best(np.zeros(0, np.int64), np.zeros(0, bool), chosen)
    assert nothing.overall.threshold is None and "0 validation users" in nothing.silent()


@settings(max_examples=100, deadline=None)
@given(st.lists(USER, max_size=30), ALPHA)
def test_it_is_silent_exactly_where_nobody_has_a_threshold_and_no_policy_could_give_one(users, alpha):
    chosen = CalibrationSettings(alpha=alpha, strata=(3, 10))
    rejections = np.array([said for said, _ in users], np.int64)
    calibration = calibrate(rows_of([row for _, row in users]), rejections, chosen)
    assert (calibration.silent() is not None) == bool(np.isinf(calibration.thresholds(np.arange(15))).all())
    best = at_best(rejections, np.array([bool(row) for _, row in users], bool), chosen)
    assert best.silent() == calibration.silent()
