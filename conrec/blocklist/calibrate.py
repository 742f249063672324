"""The threshold by conformal risk control: the smallest that blocks at most a share alpha of what users will like.

    calibration = calibrate(scores_of_likes, rejections, settings)
    thresholds = calibration.thresholds(rejections_of_tonight)

A user's risk is the share of the items liked later, and not met before, that the published list holds: those whose
score in the list is at least the threshold. R_hat(t) is the mean over the n calibration users with such a like. The
smallest t with (n R_hat(t) + 1) / (n + 1) <= alpha keeps the expected risk of a new exchangeable user at alpha or below
(Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control", arXiv 2208.02814, Theorem 1: the risk falls in
t and is at most 1). It is taken overall, and by the user's activity; a stratum of too few users takes the overall one.

Invariant: where no threshold keeps the bound (fewer than 1/alpha - 1 users), it is None and nothing is predicted: an
unproven threshold is never used. A smaller alpha has thresholds at least as large, so its lists are parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from conrec.config import CalibrationSettings
from conrec.errors import ArtefactError
from conrec.ragged import Ragged

ALPHAS = (0.01, 0.02, 0.05, 0.1)
"""Promises whose thresholds are calibrated beside the one that is served: readers may be stricter, reports compare."""

# n R_hat is the sum of the users' risks; this absorbs the rounding of sums such as 1/3 + 1/3 + 1/3.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Stratum:
    """The threshold of one group of users, with what it rests on."""

    min_rejections: int
    """Smallest number of rejections in the history."""
    max_rejections: int | None
    """Largest number; None: no limit."""
    calibrated_on: int
    """Calibration users with a like: the n of the bound."""
    threshold: float | None
    """Items of at least this score are blocked; None: no threshold keeps the bound."""
    false_block: float | None
    """R_hat at the threshold on the calibration users; None without any."""

    @property
    def users(self) -> str:
        """Whose threshold it is, in words."""
        if self.max_rejections is None:
            return f"users with {self.min_rejections} rejections or more"
        return f"users with {self.min_rejections} to {self.max_rejections} rejections"


@dataclass(frozen=True)
class Calibration:
    """The threshold over all users, and per stratum of activity; `others`: the same at other alphas."""

    alpha: float
    overall: Stratum
    strata: tuple[Stratum, ...]
    others: tuple[Calibration, ...] = ()

    def thresholds(self, rejections: np.ndarray) -> np.ndarray:
        """Each user's threshold. Shape: rejections (U,) in the history; returns (U,) float32, inf: no prediction."""
        borders = [stratum.min_rejections for stratum in self.strata[1:]]
        values = [np.inf if stratum.threshold is None else stratum.threshold for stratum in self.strata]
        return np.array(values, np.float32)[np.digitize(rejections, borders)]

    def at(self, alpha: float) -> Calibration:
        """The calibration at another alpha that was asked for. Raises KeyError for one that was not."""
        return {one.alpha: one for one in (self, *self.others)}[alpha]

    def to_json(self) -> dict[str, Any]:
        """A JSON document without infinities: null is `no threshold keeps the bound`."""
        document = {
            "alpha": self.alpha,
            "overall": vars(self.overall).copy(),
            "strata": [vars(stratum).copy() for stratum in self.strata],
        }
        return document | ({"others": [other.to_json() for other in self.others]} if self.others else {})

    def silent(self) -> str | None:
        """Why nothing is predicted for anybody; None where something is."""
        if self.overall.threshold is not None:
            return None
        return (
            f"{self.overall.calibrated_on:,} validation users with a later like, and calibration.alpha = "
            f"{self.alpha:g} needs {least_users(self.alpha):,}"
        )

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Calibration:
        """Reads what `to_json` made; raises `ArtefactError` for anything else."""
        try:
            return cls(
                alpha=float(document["alpha"]),
                overall=Stratum(**document["overall"]),
                strata=tuple(Stratum(**stratum) for stratum in document["strata"]),
                others=tuple(cls.from_json(other) for other in document.get("others", ())),
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"not a calibration ({error!r}); delete it, and it is made again") from None


def calibrate(
    scores: Ragged, rejections: np.ndarray, settings: CalibrationSettings, at_least: Calibration | None = None
) -> Calibration:
    """The threshold overall and for each stratum of activity, at `settings.alpha` and at every one of ALPHAS.

    None is smaller than that of `at_least`, of the same users and settings on other lists of theirs.

    Shape: scores: a row a user, the score in the published list of each item liked later (float32 in (0, 1), -inf where
    no threshold would list it); rejections (U,) in the user's history, the activity of the strata. Users without a
    like have no share to block and do not count.
    """
    by_alpha: dict[float, Calibration] = {}
    larger: Calibration | None = None
    for alpha in sorted({settings.alpha, *ALPHAS}, reverse=True):
        least = [one for one in (larger, at_least and at_least.at(alpha)) if one is not None]
        larger = by_alpha[alpha] = _calibrated(scores, rejections, settings, alpha, least)
    return replace(by_alpha.pop(settings.alpha), others=tuple(by_alpha.values()))


def _calibrated(
    scores: Ragged, rejections: np.ndarray, settings: CalibrationSettings, alpha: float, least: Sequence[Calibration]
) -> Calibration:
    """At one alpha; `least`: calibrations whose thresholds are never fallen below, such as at a larger alpha."""
    borders = sorted({border for border in settings.strata if border > 0})
    lows, highs = [0, *borders], [*(border - 1 for border in borders), None]
    group = np.digitize(np.asarray(rejections), borders)
    overall = _stratum(scores, alpha, 0, None)
    overall = _with_threshold(overall, scores, _raised(overall.threshold, [one.overall for one in least]))
    strata = []
    for number, (low, high) in enumerate(zip(lows, highs, strict=True)):
        own = scores.take(np.flatnonzero(group == number))
        stratum = _stratum(own, alpha, low, high)
        threshold = overall.threshold if stratum.threshold is None else stratum.threshold
        # A stratum that falls back to the overall threshold could fall below its own at a larger alpha.
        threshold = _raised(threshold, [one.strata[number] for one in least])
        strata.append(_with_threshold(stratum, own, threshold))
    return Calibration(alpha, overall, tuple(strata))


def _raised(threshold: float | None, least: Sequence[Stratum]) -> float | None:
    """The largest of these thresholds; None stays: no threshold keeps the bound."""
    return None if threshold is None else max([threshold, *(one.threshold or 0.0 for one in least)])


def _stratum(scores: Ragged, alpha: float, low: int, high: int | None) -> Stratum:
    bare = Stratum(low, high, int(np.count_nonzero(scores.lengths)), None, None)
    return _with_threshold(bare, scores, smallest_threshold(scores, alpha))


def _with_threshold(stratum: Stratum, scores: Ragged, threshold: float | None) -> Stratum:
    risk = None if not stratum.calibrated_on else 0.0
    if threshold is not None and stratum.calibrated_on:
        risk = float(blocked_share(scores, [threshold])[0])
    return replace(stratum, threshold=threshold, false_block=risk)


def least_users(alpha: float) -> int:
    """The fewest users with a later like with which a threshold can keep the bound: 1 / alpha - 1, rounded up."""
    return math.ceil((1 - _ROUNDING) / alpha - 1)


def at_best(rejections: np.ndarray, has_like: np.ndarray, settings: CalibrationSettings) -> Calibration:
    """What could be calibrated if nothing that is liked were listed: where this has no threshold there are too few
    users for any policy, which is known before one is trained.

    Shape: rejections (U,) in each user's history; has_like (U,) bool, whether there is a later like.
    """
    lengths = np.asarray(has_like).astype(np.int64)
    return calibrate(Ragged.from_lengths(np.full(lengths.sum(), -np.inf, np.float32), lengths), rejections, settings)


def smallest_threshold(scores: Ragged, alpha: float) -> float | None:
    """The smallest float32 t with (n R_hat(t) + 1) / (n + 1) <= alpha; None when none keeps it.

    R_hat only falls at observed scores, so it is enough to walk them, largest first: t is the next number above the
    first one whose blocking would break the bound.
    """
    users = int(np.count_nonzero(scores.lengths))
    allowed = alpha * (users + 1) - 1 + _ROUNDING
    if users == 0 or allowed < 0:
        return None
    values, blocked = _blocked_sums(scores)
    # blocked[-1] = n > allowed for every alpha < 1, so there is always a first value that breaks the bound.
    breaking = values[int(np.argmax(blocked > allowed))]
    # Where nothing that is liked would be listed, every score is admitted: they lie above 0.
    return max(float(np.nextafter(np.float32(breaking), np.float32(np.inf))), 0.0)


def blocked_share(scores: Ragged, thresholds: np.ndarray | list[float]) -> np.ndarray:
    """Mean over users of the share of a user's items that are blocked at each threshold.

    Shape: scores: a row a user; thresholds (T,); returns (T,) float64, NaN without any item. Users without items do not
    count.
    """
    users = int(np.count_nonzero(scores.lengths))
    if users == 0:
        return np.full(len(thresholds), np.nan)
    values, blocked = _blocked_sums(scores)
    # Values descend; the sum over those >= the threshold stands at the last one that is.
    last = np.searchsorted(-values, -np.asarray(thresholds, np.float32), side="right")
    return np.concatenate(([0.0], blocked))[last] / users


def _blocked_sums(scores: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Distinct scores, descending (V,), and the sum over users of the share at or above each (V,)."""
    weights = 1 / np.repeat(scores.lengths, scores.lengths)
    values, place = np.unique(-scores.values.astype(np.float32), return_inverse=True)
    return -values, np.cumsum(np.bincount(place, weights, len(values)))
