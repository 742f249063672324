"""Curves over theta by stratum on paper; the promise of the calibration on users it has not seen."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from conrec.config import CalibrationSettings
from conrec.evaluation.curves import activity_labels, coverage_promise, item_labels, theta_curves
from conrec.ragged import Ragged


def ragged(rows: list[list[float]], dtype: type = np.float32) -> Ragged:
    return Ragged.from_lengths(
        np.array(list(chain.from_iterable(rows)), dtype), np.array([len(row) for row in rows], np.int64)
    )


POSITIVES = ragged([[0.9, 0.1], [0.5], [], [0.7]])
NEGATIVES = ragged([[0.9], [0.6, 0.2], [0.4], []])


def test_curves_of_anchors_as_on_paper() -> None:
    curves = theta_curves(
        POSITIVES,
        NEGATIVES,
        [0.05, 0.5, 0.8],
        {"all": np.ones(4, bool), "first two": np.array([1, 1, 0, 0], bool), "third": np.array([0, 0, 1, 0], bool)},
    )
    assert list(curves) == ["all", "first two", "third"]
    # Anchor 0 loses half of its two likes at .5 and .8; anchor 2 has no like and anchor 3 no rejection.
    assert curves["all"]["false_block"] == pytest.approx([1, (1 / 2 + 1 + 1) / 3, 1 / 6])
    assert curves["all"]["catch"] == pytest.approx([1, (1 + 1 / 2 + 0) / 3, 1 / 3])
    assert curves["first two"]["false_block"] == pytest.approx([1, 3 / 4, 1 / 4])
    assert curves["first two"]["catch"] == pytest.approx([1, 3 / 4, 1 / 2])
    assert np.isnan(curves["third"]["false_block"]).all()
    assert curves["third"]["catch"] == [1, 0, 0]
    assert curves["all"]["theta"] == [0.05, 0.5, 0.8]


def test_a_stratum_of_items_drops_the_other_items_from_the_shares() -> None:
    """The first like of anchor 0 and the first rejection of anchor 1 are long-tail, so is all of anchor 3."""
    masks = np.array([1, 0, 0, 1], bool), np.array([0, 1, 0, 0], bool)
    curves = theta_curves(POSITIVES, NEGATIVES, [0.5, 0.8], {"tail": masks, "head": (~masks[0], ~masks[1])})
    assert curves["tail"]["false_block"] == pytest.approx([1, 1 / 2])
    assert curves["tail"]["catch"] == pytest.approx([1, 0])
    assert curves["head"]["false_block"] == pytest.approx([1 / 2, 0])
    assert curves["head"]["catch"] == pytest.approx([1 / 3, 1 / 3])


def test_masks_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="mask of stratum 'x' has 5 entries; give 4"):
        theta_curves(POSITIVES, NEGATIVES, [0.5], {"x": np.ones(5, bool)})
    with pytest.raises(ValueError, match="mask of stratum 'y' has 3 entries; give 4"):
        theta_curves(POSITIVES, NEGATIVES, [0.5], {"y": (np.ones(4, bool), np.ones(3, bool))})


def test_activity_strata_are_those_of_the_calibration() -> None:
    rejections = np.array([0, 2, 3, 9, 10, 99])
    labels = activity_labels(rejections, (10, 3))
    assert list(labels) == ["fewer than 3 rejections", "3 to 9 rejections", "10 rejections or more"]
    np.testing.assert_array_equal([np.flatnonzero(mask).tolist() for mask in labels.values()], [[0, 1], [2, 3], [4, 5]])
    assert list(activity_labels(rejections, (2, 3)))[1] == "2 rejections"
    assert [mask.tolist() for mask in activity_labels(rejections, (0,)).values()] == [[True] * 6]


def test_long_tail_items_have_few_rejections_in_training() -> None:
    wanted = SimpleNamespace(
        future_positives=ragged([[0, 2], [1]], np.int32), future_negatives=ragged([[1], [0, 1, 2]], np.int32)
    )
    labels = item_labels(wanted, np.array([4, 5, 0]), long_tail_item=5)
    positives, negatives = labels["long-tail items"]
    assert (positives.tolist(), negatives.tolist()) == ([True, True, False], [False, True, False, True])
    positives, negatives = labels["head items"]
    assert (positives.tolist(), negatives.tolist()) == ([False, False, True], [True, False, True, False])


def test_the_promise_is_kept_on_average_and_nearly_attained() -> None:
    """Users differ in how near their likes lie to what was generated, and have an anchor each."""
    rng = np.random.default_rng(1)
    alpha, users = 0.1, 400
    means, widths = [], []
    for seed in range(30):
        lengths = rng.integers(1, 6, users)
        values = np.repeat(rng.beta(2, 5, users), lengths) + rng.normal(0, 0.1, lengths.sum())
        similarities = Ragged.from_lengths(np.clip(values, -1, 0.999).astype(np.float32), lengths)
        settings = CalibrationSettings(alpha=alpha, strata=(3,))
        promise = coverage_promise(similarities, np.zeros(users), settings, np.arange(users), 40, seed)
        assert promise["with_theta"] == 1
        assert (promise["alpha"], promise["splits"]) == (alpha, 40)
        means.append(promise["mean"])
        widths.append([(promise[end] - promise["mean"]) / promise["sd"] for end in ("low", "high")])
    # Splits of one world share its users: the worlds are what is independent.
    error = 3 * np.std(means) / np.sqrt(len(means))
    assert alpha - 2 / (users / 2) - error <= np.mean(means) <= alpha + error
    # 95 % of a bell curve lie within 1.96 standard deviations; 40 splits, skewed to the right, are near that.
    assert np.mean(widths, axis=0) == pytest.approx([-1.96, 1.96], abs=0.6)


def test_users_are_split_not_their_anchors_and_the_other_half_is_measured() -> None:
    """One user's likes all lie at .9 and the other's at .1: calibrated on one, everything or nothing of the other is
    blocked, by the toss of a coin.
    """
    similarities = ragged([[0.9]] * 100 + [[0.1]] * 100)
    users = np.repeat([7, 3], 100)
    settings = CalibrationSettings(alpha=0.05)
    promise = coverage_promise(similarities, np.zeros(200), settings, users, splits=100, seed=0)
    assert (promise["low"], promise["high"], promise["with_theta"]) == (0, 1, 1)
    # Three standard deviations of a share of 100 at 1/2 are .15.
    assert promise["mean"] == pytest.approx(0.5, abs=0.15)
    assert promise["sd"] == pytest.approx(np.sqrt(promise["mean"] * (1 - promise["mean"])))
    assert coverage_promise(similarities, np.zeros(200), settings, users, 100, 0) == promise


@pytest.mark.parametrize(("users", "possible"), [(37, 0), (38, 1)])
def test_without_a_theta_nothing_is_blocked_and_that_is_said(users, possible) -> None:
    """alpha .05 needs 19 calibration anchors, half of 38; likes at 1 - 1e-3 can be blocked only with a theta."""
    similarities = ragged([[0.999]] * users)
    settings = CalibrationSettings(alpha=0.05)
    promise = coverage_promise(similarities, np.zeros(users), settings, np.arange(users), 20, 0)
    assert promise == {
        "alpha": 0.05,
        "splits": 20,
        "mean": 0,
        "sd": 0,
        "low": 0,
        "high": 0,
        "with_theta": possible,
    }


def test_splits_with_nothing_to_measure_do_not_count() -> None:
    """Only one of two users will like anything: in about half of the splits that user is in the measured half."""
    similarities = ragged([[0.5], []])
    promise = coverage_promise(similarities, np.zeros(2), CalibrationSettings(), np.arange(2), 40, 0)
    assert 0 < promise["splits"] < 40
    assert promise["mean"] == 0
    nothing = coverage_promise(ragged([[], []]), np.zeros(2), CalibrationSettings(), np.arange(2), 5, 0)
    assert nothing["splits"] == 0
    assert np.isnan([nothing["mean"], nothing["sd"], nothing["low"], nothing["high"], nothing["with_theta"]]).all()


def test_the_theta_over_all_users_is_the_one_measured() -> None:
    """Busy users' likes all lie at .9, quiet ones' at .1. With 5 % allowed the common theta lies above .9 and blocks
    nothing; the quiet users' own theta would block every like of the busy ones.
    """
    users = 400
    busy = np.arange(users) % 2 == 1
    similarities = Ragged.from_lengths(np.where(busy, 0.9, 0.1).astype(np.float32), np.ones(users, np.int64))
    promise = coverage_promise(
        similarities, np.where(busy, 20, 0), CalibrationSettings(alpha=0.05), np.arange(users), 20, 0
    )
    assert (promise["mean"], promise["with_theta"]) == (0, 1)
