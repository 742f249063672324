"""theta by conformal risk control: the smallest theta that blocks at most a share alpha of what users will like.

    similarities, _ = largest_similarities(generated, targets.future_positives, trie, vectors)
    calibration = calibrate(Ragged(similarities, targets.future_positives.offsets), rejections, settings)
    thetas = calibration.thetas(rejections_of_tonight)

An anchor's risk is the share of its future positives whose largest similarity to its generated IDs is at least theta;
R_hat(theta) is the mean over the n calibration anchors that have future positives. The smallest theta with
(n R_hat(theta) + 1) / (n + 1) <= alpha keeps the expected risk of a new exchangeable anchor at or below alpha
(Angelopoulos, Bates, Fisch, Lei, Schuster, "Conformal Risk Control", arXiv 2208.02814, Theorem 1: the risk falls in
theta and is at most 1). Whatever guardrails drop afterwards can only lower it.

Invariant: where no theta keeps the bound (fewer than 1/alpha - 1 anchors, or liked items that share the very ID that
was generated), theta is None and nothing is predicted there: an unproven theta is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.config import CalibrationSettings
from conrec.errors import ArtefactError
from conrec.ragged import Ragged

# n R_hat is the sum of the anchors' risks; this absorbs the rounding of sums such as 1/3 + 1/3 + 1/3.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Stratum:
    """theta of one group of users, with what it rests on."""

    min_rejections: int
    """Smallest number of rejections in the history."""
    max_rejections: int | None
    """Largest number; None: no limit."""
    anchors: int
    """Calibration anchors with at least one future positive: the n of the bound."""
    theta: float | None
    """Items at least this similar are blocked; None: nothing is predicted."""
    false_block: float | None
    """R_hat at theta on the calibration anchors; None without anchors."""

    @property
    def users(self) -> str:
        """Whose theta it is, in words."""
        if self.max_rejections is None:
            return f"users with {self.min_rejections} rejections or more"
        return f"users with {self.min_rejections} to {self.max_rejections} rejections"


@dataclass(frozen=True)
class Calibration:
    """theta over all users and per stratum of activity; the strata are what the night uses."""

    alpha: float
    overall: Stratum
    strata: tuple[Stratum, ...]

    def thetas(self, rejections: np.ndarray) -> np.ndarray:
        """Each user's theta. Shape: rejections (U,) in the history; returns (U,) float32, inf for no prediction."""
        borders = [stratum.min_rejections for stratum in self.strata[1:]]
        values = np.array([np.inf if stratum.theta is None else stratum.theta for stratum in self.strata], np.float32)
        return values[np.digitize(rejections, borders)]

    @property
    def smallest(self) -> float:
        """The smallest theta of any stratum, at which IDs are resolved; inf when nothing is predicted at all."""
        return min((stratum.theta for stratum in self.strata if stratum.theta is not None), default=float("inf"))

    def to_json(self) -> dict[str, Any]:
        """A JSON document without infinities: null is `nothing is predicted`."""
        return {
            "alpha": self.alpha,
            "overall": vars(self.overall).copy(),
            "strata": [vars(stratum).copy() for stratum in self.strata],
        }

    def silent(self) -> list[str]:
        """Why nothing is predicted for the users of each stratum that has no theta; one line each."""
        least = least_anchors(self.alpha)
        return [
            f"{stratum.users}: "
            + (
                f"{stratum.anchors:,} validation anchors with a later like, and calibration.alpha = {self.alpha:g} "
                f"needs {least:,}"
                if stratum.anchors < least
                else f"no theta keeps false blocks below calibration.alpha = {self.alpha:g} on {stratum.anchors:,} "
                "validation anchors"
            )
            for stratum in self.strata
            if stratum.theta is None
        ]

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Calibration:
        """Reads what `to_json` made; raises `ArtefactError` for anything else."""
        try:
            return cls(
                alpha=float(document["alpha"]),
                overall=Stratum(**document["overall"]),
                strata=tuple(Stratum(**stratum) for stratum in document["strata"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"not a calibration of theta ({error!r}); run the train stage again") from None


def calibrate(similarities: Ragged, rejections: np.ndarray, settings: CalibrationSettings) -> Calibration:
    """theta overall and for each stratum of activity.

    Shape: similarities: A rows, the largest similarity of each future positive of an anchor to the anchor's generated
    IDs (float32, -inf without generated IDs); rejections (A,) in the anchor's history, the activity of the strata.
    Anchors without future positives have no share to block and do not count.
    """
    rejections = np.asarray(rejections)
    borders = sorted({border for border in settings.strata if border > 0})
    lows, highs = [0, *borders], [*(border - 1 for border in borders), None]
    group = np.digitize(rejections, borders)
    strata = tuple(
        _stratum(similarities.take(np.flatnonzero(group == number)), settings.alpha, low, high)
        for number, (low, high) in enumerate(zip(lows, highs, strict=True))
    )
    return Calibration(settings.alpha, _stratum(similarities, settings.alpha, 0, None), strata)


def _stratum(similarities: Ragged, alpha: float, low: int, high: int | None) -> Stratum:
    anchors = int(np.count_nonzero(similarities.lengths))
    theta = smallest_theta(similarities, alpha)
    risk = None if anchors == 0 else 0.0 if theta is None else float(blocked_share(similarities, [theta])[0])
    return Stratum(low, high, anchors, theta, risk)


def least_anchors(alpha: float) -> int:
    """The fewest anchors with a future positive with which a theta can keep the bound: 1 / alpha - 1, rounded up."""
    return math.ceil((1 - _ROUNDING) / alpha - 1)


def at_best(rejections: np.ndarray, has_positive: np.ndarray, settings: CalibrationSettings) -> Calibration:
    """What could be calibrated if nothing that was generated were near a future positive: a stratum without theta here
    has too few anchors for any policy, which is known before one is trained.

    Shape: rejections (A,) in each anchor's history; has_positive (A,) bool, whether it has a future positive.
    """
    lengths = np.asarray(has_positive).astype(np.int64)
    return calibrate(Ragged.from_lengths(np.full(lengths.sum(), -np.inf, np.float32), lengths), rejections, settings)


def smallest_theta(similarities: Ragged, alpha: float) -> float | None:
    """The smallest float32 theta with (n R_hat(theta) + 1) / (n + 1) <= alpha; None when none up to 1 keeps it.

    R_hat only falls at observed similarities, so it is enough to walk them, largest first: theta is the next number
    above the first one whose blocking would break the bound.
    """
    anchors = int(np.count_nonzero(similarities.lengths))
    allowed = alpha * (anchors + 1) - 1 + _ROUNDING
    if anchors == 0 or allowed < 0:
        return None
    values, blocked = _blocked_sums(similarities)
    # blocked[-1] = n > allowed for every alpha < 1, so there is always a first value that breaks the bound.
    breaking = values[int(np.argmax(blocked > allowed))]
    theta = np.nextafter(np.float32(breaking), np.float32(np.inf))
    if theta > 1:
        return None
    # An anchor that generated nothing blocks nothing: a similarity lies in [-1, 1].
    return max(float(theta), -1.0)


def blocked_share(similarities: Ragged, thetas: np.ndarray | list[float]) -> np.ndarray:
    """Mean over anchors of the share of an anchor's items that are blocked at each theta.

    Shape: similarities: A rows, the largest similarity of each future positive (then this is false_block@theta) or of
    each future negative (catch@theta); thetas (T,); returns (T,) float64, NaN without any item. Anchors without items
    do not count.
    """
    anchors = int(np.count_nonzero(similarities.lengths))
    if anchors == 0:
        return np.full(len(thetas), np.nan)
    values, blocked = _blocked_sums(similarities)
    # Values descend; the sum over those >= theta stands at the last one that is.
    last = np.searchsorted(-values, -np.asarray(thetas, np.float32), side="right")
    return np.concatenate(([0.0], blocked))[last] / anchors


def _blocked_sums(similarities: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Distinct similarities, descending (V,), and the sum over anchors of the share at or above each (V,)."""
    weights = 1 / np.repeat(similarities.lengths, similarities.lengths)
    values, place = np.unique(-similarities.values.astype(np.float32), return_inverse=True)
    return -values, np.cumsum(np.bincount(place, weights, len(values)))
