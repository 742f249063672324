"""The score that ranks, calibrates and publishes: log odds that a user rejects a thing, and how likely it is met.

    score = Score(counted, judged, reach)                               # estimates of `fit_linear`
    odds, exposure = score.parts(counts, users, counts.expected(users)) # (B, T), what is counted alone
    odds, exposure = score.parts_of(columns)                            # (N,), of pairs the policy was asked about

    s = sigmoid( odds(thing, user) + reach * exposure(thing, user) )

`odds` is a regularised logistic regression of rejected against liked on what was shown in earlier windows; `exposure`
one of shown against not shown among what is likely to be met. A row of a blocklist only matters when its item would be
shown: a larger `reach` makes lists shorter for what they catch. Each has two forms: of the counted columns, for every
thing, and of these with what the policy says (`log_prob`, `verdict`), where it was asked. Both estimate the same
quantity, so one threshold cuts both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.blocklist.counts import EXPECTED, Counts
from conrec.errors import ArtefactError

LOG_PROB, VERDICT = "log_prob", "verdict"
RIDGE = 1.0
"""Weight of the squared standardised coefficients in a regression."""
_ITERATIONS = 100
_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Linear:
    """bias + the sum of weight times column; `weights` by name of the column."""

    weights: Mapping[str, float]
    bias: float

    def of(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Of pairs. Shape: (N,) a column -> (N,) float64."""
        total = np.full(len(next(iter(columns.values()))), self.bias)
        for name, weight in self.weights.items():
            total += weight * columns[name]
        return total

    def dense(self, counts: Counts, users: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Of all things, from what is counted. Shape: users (B,), expected (B, T) of theirs -> (B, T) float32."""
        people = np.zeros(len(users))
        for name, weight in self.weights.items():
            if name in counts.of_users:
                people += weight * counts.of_users[name][users]
        total = self.of_things(counts) + people.astype(np.float32)[:, None]
        for name, crossed in counts.crossed.items():
            if name in self.weights:
                total += (np.float32(self.weights[name]) * crossed.dense(users))[:, crossed.keys]
        if EXPECTED in self.weights:
            total += np.float32(self.weights[EXPECTED]) * expected
        return total

    def of_things(self, counts: Counts) -> np.ndarray:
        """The part that is the same for every user. Shape: (T,) float32."""
        total = np.full(len(counts.things), self.bias)
        for name, weight in self.weights.items():
            if name in counts.of_things:
                total += weight * counts.of_things[name]
        return total.astype(np.float32)

    def unfolded(self, name: str, inner: Linear) -> Linear:
        """The same where the column of that name is `inner` of others."""
        scale = self.weights[name]
        weights = {other: weight for other, weight in self.weights.items() if other != name}
        for other, weight in inner.weights.items():
            weights[other] = weights.get(other, 0.0) + scale * weight
        return Linear(weights, self.bias + scale * inner.bias)

    def to_json(self) -> dict[str, Any]:
        """A JSON document."""
        return {"bias": self.bias, "weights": dict(self.weights)}


@dataclass(frozen=True)
class Estimate:
    """Both parts of the score over one set of columns."""

    odds: Linear
    exposure: Linear


@dataclass(frozen=True)
class Score:
    """`counted` scores everything; `judged`, where there is a policy, what it was asked about."""

    counted: Estimate
    judged: Estimate | None
    reach: float

    def parts_of(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Odds and exposure of pairs that the policy was asked about. Shape: (N,) a column -> (N,) float64 each."""
        assert self.judged is not None
        return self.judged.odds.of(columns), self.judged.exposure.of(columns)

    def parts(self, counts: Counts, users: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Odds and exposure of all things by what is counted. Shape: users (B,), expected (B, T) -> (B, T) float32
        each."""
        odds, exposure = self.counted.odds, self.counted.exposure
        return odds.dense(counts, users, expected), exposure.dense(counts, users, expected)

    def for_everybody(self, counts: Counts) -> np.ndarray:
        """The score without what differs between users. Shape: (T,) float32 in (0, 1)."""
        return sigmoid(self.counted.odds.of_things(counts) + self.reach * self.counted.exposure.of_things(counts))

    def to_json(self) -> dict[str, Any]:
        """A JSON document: every weight by name."""
        document: dict[str, Any] = {"reach": self.reach}
        for name, estimate in (("counted", self.counted), ("judged", self.judged)):
            document[name] = (
                None if estimate is None else {"odds": estimate.odds.to_json(), "exposure": estimate.exposure.to_json()}
            )
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Score:
        """Reads what `to_json` made; raises `ArtefactError` for anything else."""

        def estimate(parts: dict[str, Any]) -> Estimate:
            return Estimate(*(Linear(parts[part]["weights"], parts[part]["bias"]) for part in ("odds", "exposure")))

        try:
            judged = document["judged"]
            return cls(
                estimate(document["counted"]), None if judged is None else estimate(judged), float(document["reach"])
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"not a score ({error!r}); delete the calibration, and it is made again") from None


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-values)) as float32, in (0, 1): the nearest numbers inside where it would round to 0 or 1."""
    with np.errstate(over="ignore"):
        result = (1 / (1 + np.exp(-values.astype(np.float32)))).astype(np.float32)
    return np.clip(result, np.finfo(np.float32).tiny, np.nextafter(np.float32(1), np.float32(0)))


def fit_linear(columns: Mapping[str, np.ndarray], names: tuple[str, ...], label: np.ndarray) -> Linear:
    """A ridge-regularised logistic regression by Newton's method; the bias is not regularised.

    Shape: (N,) a column, label (N,) bool. Columns are standardised inside, so the ridge treats them alike; one that
    does not vary has no weight. Without both labels every weight is 0 and the bias the smoothed log odds.
    """
    label = np.asarray(label, bool)
    positives = int(label.sum())
    base = float(np.log((positives + 0.5) / (len(label) - positives + 0.5)))
    if positives in (0, len(label)):
        return Linear(dict.fromkeys(names, 0.0), base)
    matrix = np.stack([np.asarray(columns[name], np.float64) for name in names], axis=1)
    mean, spread = matrix.mean(axis=0), matrix.std(axis=0)
    varies = spread > 1e-9
    design = np.concatenate([(matrix[:, varies] - mean[varies]) / spread[varies], np.ones((len(matrix), 1))], axis=1)
    ridge = np.append(np.full(int(varies.sum()), RIDGE), 0.0)
    weights = np.append(np.zeros(int(varies.sum())), base)
    signs = np.where(label, -1.0, 1.0)

    def loss(at: np.ndarray) -> float:
        return float(np.logaddexp(0, signs * (design @ at)).sum() + ridge @ at**2 / 2)

    least = loss(weights)
    for _ in range(_ITERATIONS):
        share = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (share - label) + ridge * weights
        curvature = (design * (share * (1 - share))[:, None]).T @ design + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        # Where few rows tell the labels apart, a whole step leaps beyond the best, and back, for ever.
        while (value := loss(weights - step)) > least and np.abs(step).max() >= _TOLERANCE:
            step /= 2
        weights, least = weights - step, min(least, value)
        if np.abs(step).max() < _TOLERANCE:
            break
    raw = np.zeros(len(names))
    raw[varies] = weights[:-1] / spread[varies]
    bias = float(weights[-1] - raw @ mean)
    return Linear({name: float(weight) for name, weight in zip(names, raw, strict=True)}, bias)
