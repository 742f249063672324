"""Measures of ranked predictions against what users rejected and liked afterwards.

    values = per_anchor(ranked, targets, negatives_in_history, rejections, settings.evaluation)
    figures = summarise(values, anchors.users, settings.evaluation.resamples, settings.seed)

Invariant: a measure is a function of (prediction, anchor) alone, NaN where it is undefined, so that every
system is averaged over the same anchors. A figure is the mean over the anchors where it is defined, its
interval a bootstrap over users, because the anchors of one user are not independent.

| measure | 1 when the top K holds | defined for |
|---|---|---|
| HR | the next item that the user rejected | anchors with a next rejection |
| FHR | any item rejected in the window | anchors with a rejection in the window |
| FRecall | hits / min(K, rejections in the window) | the same |
| LUF | FHR | the same, users with few rejections in the history |
| LIF | any long-tail item rejected in the window | anchors with such an item |
| FPH | any item liked in the window: the harm | anchors with a like in the window |

Lift = FHR / FPH, a ratio of means: the value of an anchor would divide by zero. FHR and FPH are each measured
where they can be 1: counting users who like nothing later would flatter every system's FPH alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from conrec.ragged import Ragged, pairs

if TYPE_CHECKING:
    from conrec.config import EvaluationSettings
    from conrec.feedback.targets import Targets

MEASURES = ("HR", "FHR", "FRecall", "LUF", "LIF", "FPH", "Lift")
"""The order in which figures are shown."""

SERVED_K = 20
"""Rank at which the measures of the published figures are taken."""

Figure = dict[str, float]
"""value, low, high: a mean and the ends of its 95 % interval."""

# Weights of this many (resample, user) pairs are held at once: 64 MiB.
_CHUNK = 8_000_000


def per_anchor(
    ranked: np.ndarray,
    targets: Targets,
    negatives_in_history: np.ndarray,
    training_rejections_per_item: np.ndarray,
    settings: EvaluationSettings,
) -> dict[str, np.ndarray]:
    """Every measure of every anchor, NaN where it is undefined; K is the width of `ranked`.

    Shape: ranked (A, K) item rows, best first, -1 for no prediction; negatives_in_history (A,) distinct
    items rejected with time <= t; training_rejections_per_item (I,) users who rejected the item before the
    training cut. Values: (A,) float64 each.
    Raises ValueError when shapes disagree or a row predicts an item twice, which would count one hit twice.
    """
    count = len(ranked)
    for name, length in (
        ("targets.next_negative", len(targets.next_negative)),
        ("targets.future_negatives", len(targets.future_negatives)),
        ("targets.future_positives", len(targets.future_positives)),
        ("negatives_in_history", len(negatives_in_history)),
    ):
        if length != count:
            raise ValueError(f"{name} has {length} rows for {count} rows of predictions; give one per anchor")
    window, negatives = of_window(ranked, targets), targets.future_negatives
    tail = training_rejections_per_item[negatives.values] < settings.long_tail_item
    tail_negatives = Ragged.from_rows(negatives.rows[tail], negatives.values[tail], count)

    next_negative = np.asarray(targets.next_negative)
    next_hit = ((ranked == next_negative[:, None]) & (ranked >= 0)).any(axis=1)
    return {
        "HR": np.where(next_negative >= 0, next_hit, np.nan),
        "FHR": window["FHR"],
        "FRecall": window["FRecall"],
        "LUF": np.where(np.asarray(negatives_in_history) < settings.long_tail_user, window["FHR"], np.nan),
        "LIF": np.where(tail_negatives.lengths > 0, members(tail_negatives, ranked).any(axis=1), np.nan),
        "FPH": window["FPH"],
    }


def of_window(ranked: np.ndarray, targets: Targets) -> dict[str, np.ndarray]:
    """FHR, FPH and FRecall of `per_anchor`, which need the window alone. Shape and errors as there."""
    require_distinct(ranked)
    negatives, positives = targets.future_negatives, targets.future_positives
    hits = members(negatives, ranked).sum(axis=1)
    rejected_later = negatives.lengths > 0
    return {
        "FHR": np.where(rejected_later, hits > 0, np.nan),
        "FPH": np.where(positives.lengths > 0, members(positives, ranked).any(axis=1), np.nan),
        "FRecall": np.where(rejected_later, hits / np.clip(negatives.lengths, 1, ranked.shape[1]), np.nan),
    }


def require_distinct(ranked: np.ndarray) -> None:
    """Raises ValueError where a row (A, K) of items, -1 for none, has one twice: it would count as two."""
    ordered = np.sort(ranked, axis=1)
    repeated = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeated.any():
        raise ValueError(f"anchor {repeated.argmax()} is predicted an item twice; rank every item at most once")


def members(sets: Ragged, items: np.ndarray) -> np.ndarray:
    """Whether `items[a, j]` is in row a of `sets`; -1 is in no set.

    Shape: sets A rows of item rows, items (A, K); returns (A, K) bool.
    """
    # An (anchor, item) pair as one integer: membership in all sets is one binary search, without a loop.
    width = int(max(sets.values.max(initial=0), items.max(initial=0))) + 1
    present = np.sort(pairs(sets.rows, sets.values, width))
    keys = pairs(np.arange(len(items))[:, None], np.maximum(items, 0), width)
    place = np.searchsorted(present, keys)
    found = np.zeros(items.shape, bool)
    inside = place < len(present)
    found[inside] = present[place[inside]] == keys[inside]
    return found & (items >= 0)


def exclude(ranked: np.ndarray, excluded: Ragged, k: int) -> np.ndarray:
    """The first k predictions of each anchor that are not excluded, in their order, -1 behind them.

    Shape: ranked (A, W) item rows, excluded A rows of item rows; returns (A, k) int32. To have k left for
    certain, W must be at least k plus the longest row of `excluded`.
    """
    return exclude_scored(ranked, np.zeros(ranked.shape, np.float32), excluded, k)[0]


def exclude_scored(ranked: np.ndarray, scores: np.ndarray, excluded: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`exclude` with the scores of what is kept: (A, k) int32 and (A, k) float32, -inf behind them."""
    keep = (ranked >= 0) & ~members(excluded, ranked)
    place = np.cumsum(keep, axis=1) - 1
    keep &= place < k
    to = keep.nonzero()[0], place[keep]
    items = np.full((len(ranked), k), -1, np.int32)
    kept_scores = np.full((len(ranked), k), -np.inf, np.float32)
    items[to], kept_scores[to] = ranked[keep], scores[keep]
    return items, kept_scores


def summarise(values: dict[str, np.ndarray], user_index: np.ndarray, resamples: int, seed: int) -> dict[str, Figure]:
    """Each measure's mean with a 95 % percentile bootstrap interval by user, and Lift from the same resamples.

    Shape: values (A,) each, NaN where undefined; user_index (A,) int, equal for anchors of one user. A measure
    that no anchor defines is NaN.
    """
    point, drawn = resampled_means(values, user_index, resamples, seed)
    return {name: figure_of(point[name], drawn[name]) for name in point}


def paired_difference(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], user_index: np.ndarray, resamples: int, seed: int
) -> dict[str, Figure]:
    """`ours` minus `theirs` on the same anchors, with the 95 % interval of the difference by user.

    Both are measured on the same resamples, so what makes a user easy for every system cancels.
    Raises ValueError when the two do not have the same measures on the same anchors.
    """
    for name in ours.keys() ^ theirs.keys():
        raise ValueError(f"only one of the two systems has {name}; measure both with per_anchor")
    for name, mine in ours.items():
        if mine.shape != theirs[name].shape or not np.array_equal(np.isnan(mine), np.isnan(theirs[name])):
            raise ValueError(f"{name} is defined for other anchors in the two systems; measure both on the same ones")
    point_ours, drawn_ours = resampled_means(ours, user_index, resamples, seed)
    point_theirs, drawn_theirs = resampled_means(theirs, user_index, resamples, seed)
    return {
        name: figure_of(point_ours[name] - point_theirs[name], drawn_ours[name] - drawn_theirs[name])
        for name in point_ours
    }


def resampled_means(
    values: dict[str, np.ndarray], user_index: np.ndarray, resamples: int, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Means over all users, and over the `resamples` draws of `user_weights`: equal calls for two systems are paired.

    Shape: values (A,) each, NaN where undefined; user_index (A,) int; returns means and (R,) means of each measure,
    Lift among them where FHR and FPH are.
    """
    _, users = np.unique(user_index, return_inverse=True)
    user_count = int(users.max(initial=-1)) + 1
    names = list(values)
    sums = np.stack([np.bincount(users, np.nan_to_num(values[name]), user_count) for name in names], axis=1)
    counts = np.stack([np.bincount(users, ~np.isnan(values[name]), user_count) for name in names], axis=1)
    totals = np.concatenate([sums, counts], axis=1)

    rows = [totals.sum(axis=0, keepdims=True)]
    rows += [weights.T @ totals for weights in user_weights(user_count, resamples, seed)]
    means = np.concatenate(rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = means[:, : len(names)] / means[:, len(names) :]
        columns = dict(zip(names, means.T, strict=True))
        if "FHR" in columns and "FPH" in columns:
            columns["Lift"] = columns["FHR"] / columns["FPH"]
    return {name: float(column[0]) for name, column in columns.items()}, {
        name: column[1:] for name, column in columns.items()
    }


def user_weights(user_count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is in each resample: as many users as there are, with replacement.

    The weights depend on the seed and the number of users only: equal calls for two systems are paired.
    Shape: parts (U, R) float64 that are R = `resamples` together; none without users.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(user_count, 1))
    for start in range(0, resamples if user_count else 0, chunk):
        size = min(chunk, resamples - start)
        draws = rng.integers(0, user_count, (size, user_count)) + np.arange(size)[:, None] * user_count
        weights = np.bincount(draws.ravel(), minlength=size * user_count).reshape(size, user_count)
        yield np.ascontiguousarray(weights.T, np.float64)


def figure_of(value: float, drawn: np.ndarray) -> Figure:
    """A value with the ends of the 95 % percentile interval of its resampled values (R,), NaN left out."""
    # A resample in which nobody defines the measure says nothing about its spread. Infinite Lift does, and
    # taking observed values instead of interpolating keeps it from becoming NaN.
    drawn = drawn[~np.isnan(drawn)]
    low = np.percentile(drawn, 2.5, method="lower") if len(drawn) else np.nan
    high = np.percentile(drawn, 97.5, method="higher") if len(drawn) else np.nan
    return {"value": float(value), "low": float(low), "high": float(high)}
