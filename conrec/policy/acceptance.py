"""Whether a stage of GRPO helped, beyond what chance makes of a few validation anchors.

    sure_lift(reading) > sure_lift(best)       # the best so far of a rival, whose stages are not tested
    gain = lift_gain(before, after, users, readings)
    gain.sure                                  # accepted

Lift is FHR / FPH. That of a reading which hits one rejection and no like is infinite and says nothing, so where nothing
else stands behind the choice, readings are compared by the Lift that each surely has. The two readings of a gain are of
the same users. If a stage has no effect, a
user's two readings may as well be exchanged: `chance` is how often exchanging those of random users gives as large a
gain (a permutation test, valid for any number of hits). A stage keeps the best of several readings; each is tested at
its share of the level, so that a stage without an effect is accepted in at most one case of twenty, however often it
was looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

import numpy as np

LEVEL = 0.05
"""Probability that a stage without an effect is accepted."""
_LEAST_EXCHANGES = 4000
_AT_ONCE = 1 << 22
_HALF = 0.5
"""Hits added to each sum, so that none is 0."""
_SURE = NormalDist().inv_cdf(1 - LEVEL)
"""Standard errors below the estimate, of a one-sided bound at the level."""


@dataclass(frozen=True)
class Gain:
    """`ratio`: Lift after / Lift before; `chance`: the probability of such a gain without an effect."""

    ratio: float
    chance: float
    readings: int

    @property
    def sure(self) -> bool:
        """Whether chance does not explain the best of so many readings."""
        return self.ratio > 1 and self.chance <= LEVEL / self.readings


def sure_lift(values: Mapping[str, np.ndarray]) -> float:
    """The log of the Lift that a reading has at least, but for one case of twenty: a bound on the ratio of two counts.

    Shape: `fhr` and `fph` of each anchor (A,), 1 where it is hit, NaN where undefined.
    """
    rejected, liked = (float(np.nansum(values[name])) + _HALF for name in ("fhr", "fph"))
    return float(np.log(rejected / liked) - _SURE * np.sqrt(1 / rejected + 1 / liked))


def lift_gain(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], users: np.ndarray, readings: int
) -> Gain:
    """Of `fhr` and `fph` of each anchor, NaN where undefined.

    Shape: values (A,), users (A,) int, exchanged as wholes; `readings`: how many the best was chosen from.
    """
    _, user = np.unique(users, return_inverse=True)
    count = int(user.max(initial=-1)) + 1
    sums = {
        (name, place): np.bincount(user, np.nan_to_num(values[name]), count)
        for place, values in enumerate((before, after))
        for name in ("fhr", "fph")
    }

    def gains(exchanged: np.ndarray) -> np.ndarray:
        """log of the ratio where these users' readings are exchanged. Shape: (R, U) 0/1 -> (R,)."""
        total = np.zeros(len(exchanged))
        for sign, name in ((1, "fhr"), (-1, "fph")):
            moved = exchanged @ (sums[name, 1] - sums[name, 0])
            was, is_ = sums[name, 0].sum() + _HALF, sums[name, 1].sum() + _HALF
            total += sign * (np.log(is_ - moved) - np.log(was + moved))
        return total

    observed = float(gains(np.zeros((1, count)))[0])
    # The smallest chance that can be found is 1 / (1 + exchanges): it has to lie below a reading's share of the level.
    exchanges = max(_LEAST_EXCHANGES, ceil(4 * readings / LEVEL))
    rng, least, done = np.random.default_rng(0), 0, 0
    while done < exchanges:
        size = min(max(1, _AT_ONCE // max(count, 1)), exchanges - done)
        drawn = gains(rng.integers(0, 2, (size, count)).astype(float))
        least += int(np.count_nonzero(drawn >= observed - 1e-9))
        done += size
    return Gain(float(np.exp(observed)), (1 + least) / (1 + exchanges), readings)
