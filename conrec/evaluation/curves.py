"""What theta does to whom: false_block and catch over theta by stratum, and whether calibration keeps its promise.

    strata = activity_labels(rejections, settings.calibration.strata)
    curves = theta_curves(similar_positives, similar_negatives, THETAS, strata)
    promise = coverage_promise(similar_positives, rejections, settings.calibration, anchors.users, seed=settings.seed)

The similarities are those of `largest_similarities` for the future positives (negatives) of each anchor. Invariant: a
rate is the mean over the anchors that have such an item, as in calibration; a stratum only removes anchors or items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from conrec.blocklist.calibrate import blocked_share, calibrate
from conrec.config import CalibrationSettings
from conrec.feedback.anchors import Targets
from conrec.ragged import Ragged

Stratum = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Which anchors (A,), or which values of the positives and which of the negatives: bool masks."""


def activity_labels(rejections: np.ndarray, borders: Iterable[int]) -> dict[str, np.ndarray]:
    """Anchors by the rejections in their history, in the strata of the calibration.

    Shape: rejections (A,); returns a mask (A,) for each label; together they hold every anchor once.
    """
    borders = sorted({border for border in borders if border > 0})
    group = np.digitize(rejections, borders)
    if not borders:
        return {"any number of rejections": group == 0}
    middle = [
        f"{low} rejections" if low == high - 1 else f"{low} to {high - 1} rejections"
        for low, high in zip(borders[:-1], borders[1:], strict=True)
    ]
    labels = [f"fewer than {borders[0]} rejections", *middle, f"{borders[-1]} rejections or more"]
    return {label: group == number for number, label in enumerate(labels)}


def item_labels(
    wanted: Targets, training_rejections_per_item: np.ndarray, long_tail_item: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Future items by how many users rejected them in training: masks of the positives' and the negatives' values.

    Shape: training_rejections_per_item (I,); long-tail items have fewer than `long_tail_item`.
    """
    tail = np.asarray(training_rejections_per_item) < long_tail_item
    positives, negatives = tail[wanted.future_positives.values], tail[wanted.future_negatives.values]
    return {"long-tail items": (positives, negatives), "head items": (~positives, ~negatives)}


def theta_curves(
    positives: Ragged, negatives: Ragged, thetas: np.ndarray | list[float], strata: Mapping[str, Stratum]
) -> dict[str, dict[str, list[float]]]:
    """false_block and catch of each stratum at each theta, beside `theta` itself; NaN where a stratum has no item.

    Shape: positives and negatives A rows of similarities; thetas (T,).
    Raises ValueError when a mask fits neither the anchors nor the values.
    """
    curves = {}
    for label, stratum in strata.items():
        masks = stratum if isinstance(stratum, tuple) else (stratum, stratum)
        per_value = isinstance(stratum, tuple)
        false_block, catch = (
            blocked_share(_only(similarities, mask, per_value, label), thetas)
            for similarities, mask in zip((positives, negatives), masks, strict=True)
        )
        curves[label] = {
            "theta": np.asarray(thetas, float).tolist(),
            "false_block": false_block.tolist(),
            "catch": catch.tolist(),
        }
    return curves


def coverage_promise(
    similarities: Ragged,
    rejections: np.ndarray,
    settings: CalibrationSettings,
    users: np.ndarray,
    splits: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """The false-block rate on users whom the calibration of theta has not seen, over random halves of the users.

    Each split calibrates theta on one half and measures the mean false_block of the anchors of the other half with the
    theta over all users. Where no theta keeps the bound nothing is blocked: the rate is 0, and `with_theta` says how
    often there was one. Splits in which no anchor of the other half has a future positive do not count.
    Shape: similarities A rows, of the future positives; rejections (A,) in the history; users (A,) int. Returns alpha,
    splits (how many count), the mean and sd of the rate over them, low and high (2.5 and 97.5 percentiles), with_theta.
    """
    _, rows = np.unique(users, return_inverse=True)
    user_count = int(rows.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    rates, existing = [], []
    for _ in range(splits):
        calibrated = (rng.permutation(user_count) < user_count // 2)[rows]
        theta = calibrate(
            similarities.take(np.flatnonzero(calibrated)), np.asarray(rejections)[calibrated], settings
        ).overall.theta
        unseen = similarities.take(np.flatnonzero(~calibrated))
        # No similarity reaches infinity.
        rates.append(blocked_share(unseen, [np.inf if theta is None else theta])[0])
        existing.append(theta is not None)
    measured = np.array(rates, float)
    counted = ~np.isnan(measured)
    measured, with_theta = measured[counted], np.array(existing, bool)[counted]
    empty = len(measured) == 0
    low, high = (np.nan, np.nan) if empty else np.percentile(measured, (2.5, 97.5))
    return {
        "alpha": settings.alpha,
        "splits": len(measured),
        "mean": np.nan if empty else float(measured.mean()),
        "sd": np.nan if empty else float(measured.std()),
        "low": float(low),
        "high": float(high),
        "with_theta": np.nan if empty else float(with_theta.mean()),
    }


def _only(similarities: Ragged, mask: np.ndarray, per_value: bool, label: str) -> Ragged:
    expected = len(similarities.values) if per_value else len(similarities)
    if len(mask) != expected:
        raise ValueError(f"the mask of stratum {label!r} has {len(mask)} entries; give {expected}")
    kept = mask if per_value else mask[similarities.rows]
    return Ragged.from_rows(similarities.rows[kept], similarities.values[kept], len(similarities))
