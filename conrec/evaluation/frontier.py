"""Systems compared at equal harm: catch at a false-block rate of 1 %, and FHR at equal FPH.

    figure = catch_at_false_block(items, scores, targets, anchors.users, settings.resamples, settings.seed)
    better = frontier_difference(ours, theirs, values[baseline], anchors.users, world.halves, resamples, seed)

Every system trades rejections caught for likes lost. `catch_at_false_block` pools the predictions of all anchors and
blocks those whose score reaches a threshold: false_block is the share of all future positives that is blocked, catch
that of all future negatives. `frontier_difference` reads two systems at several settings off at the same FPH.

Invariant: the threshold, or the place on the frontier, is chosen anew in every resample of users, so that an interval
knows about the choice; two systems that are compared see the same resamples. Which settings make a frontier is chosen
on one half of the users and read on the other, for every system by the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from conrec.evaluation.metrics import Figure, figure_of, members, require_distinct, user_weights
from conrec.feedback.targets import Targets

Ordering = tuple[np.ndarray, np.ndarray]
"""Predictions with the scores that order them: (A, W) item rows, -1 padding, and (A, W) scores, higher first."""
Values = Mapping[str, np.ndarray]
"""Measures of `per_anchor` of one system at one setting: FHR and FPH (A,), NaN where undefined."""

# This many (score, resample) pairs are held at once: 32 MiB.
_CHUNK = 4_000_000
# A limit of 7 % on 100 likes allows 7 of them, although .07 x 100 is a little more or less in floating point.
_SLACK = 1e-9


def by_rank(items: np.ndarray) -> np.ndarray:
    """Scores that block the first place of all lists before any second place.

    Shape: items (A, W); returns (A, W) float32, -inf for padding.
    """
    places = -np.arange(items.shape[1], dtype=np.float32)
    return np.where(items >= 0, places, np.float32(-np.inf))


def catch_at_false_block(
    items: np.ndarray,
    scores: np.ndarray,
    targets: Targets,
    users: np.ndarray,
    resamples: int,
    seed: int,
    limit: float = 0.01,
) -> Figure:
    """The largest catch of any threshold with false_block <= limit, and its 95 % bootstrap interval by user.

    Predictions of equal score are blocked together or not at all. NaN without future positives or negatives.
    Shape: items (A, W) item rows, -1 padding; scores (A, W), comparable between anchors; users (A,) int.
    Raises ValueError when shapes disagree, a row predicts an item twice, or the score of a prediction is NaN.
    """
    pool = _Pool.of(items, scores, targets, users)
    drawn = [_catches(pool, weights, limit) for weights in user_weights(len(pool.all_positives), resamples, seed)]
    return figure_of(_point(pool, limit), np.concatenate([np.zeros(0), *drawn]))


def catch_difference(
    ours: Sequence[Ordering],
    theirs: Sequence[Ordering],
    targets: Targets,
    users: np.ndarray,
    resamples: int,
    seed: int,
    limit: float = 0.01,
) -> dict[str, Figure]:
    """Catch at equal false_block: `difference` = ours - theirs and `ratio` = ours / theirs, on the same resamples.

    Each system comes with one ordering or several (its scores, `by_rank`); the one with the larger catch over all
    users stands for it in every resample. Shapes and errors as in `catch_at_false_block`.
    """
    best = [
        max((_Pool.of(items, scores, targets, users) for items, scores in system), key=lambda pool: _point(pool, limit))
        for system in (ours, theirs)
    ]
    point = [np.array([_point(pool, limit)]) for pool in best]
    rows = [
        [_catches(pool, weights, limit) for pool in best]
        for weights in user_weights(len(best[0].all_positives), resamples, seed)
    ]
    mine, other = np.concatenate([np.transpose(point), *(np.transpose(row) for row in rows)]).T
    return _difference_and_ratio(mine, other)


def catch_curve(items: np.ndarray, scores: np.ndarray, targets: Targets, grid: np.ndarray) -> np.ndarray:
    """The largest catch at each false_block of the grid.

    Shape: grid (G,); returns (G,) float64. Other shapes and errors as in `catch_at_false_block`.
    """
    pool = _Pool.of(items, scores, targets, np.arange(len(items)))
    liked, rejected = pool.all_positives.sum(), pool.all_negatives.sum()
    if liked == 0 or rejected == 0:
        return np.full(len(grid), np.nan)
    false_blocks = np.cumsum(pool.positives.sum(axis=1))
    catches = np.concatenate(([0.0], np.cumsum(pool.negatives.sum(axis=1))))
    return catches[np.searchsorted(false_blocks, np.asarray(grid) * liked + _SLACK, side="right")] / rejected


def frontier_difference(
    ours: Sequence[Values],
    theirs: Sequence[Values],
    at: Values,
    users: np.ndarray,
    halves: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, float | Figure]:
    """FHR of two frontiers at the same FPH, each read on users that did not choose it.

    `ours` and `theirs` are values of `per_anchor` of two systems, each at its settings; both are read at the FPH of
    `at`. Serving a share of users with one setting and the rest with another, or with nothing, reaches every line
    between them: a frontier runs from (0, 0) along lines between points (FPH, FHR), and beyond the last is level. The
    corners of the upper hull on one half of the users say which points; the frontier through these points as the other
    half has them is read at that half's FPH of `at`. The halves then change places, and the two FHR are averaged by
    the anchors that define them. The best of many points on the users on whom it is read would owe part of its
    FHR to chance, and more of it the more points there are.
    Shape: users (A,) int; halves (A,) bool, which half each anchor's user is in. Returns `FPH` of `at`, `FHR` of
    theirs and `ours` there, and the Figures `difference` = ours - FHR and `ratio` = ours / FHR, from the same resamples
    of users; all but FPH are NaN where a half has no user that defines FHR, or none that defines FPH.
    Raises ValueError without points, or when two systems are measured on different anchors.
    """
    if not ours or not theirs:
        raise ValueError("a frontier needs a point; give the values of at least one setting of each system")
    systems = [at, *ours, *theirs]
    for name in ("FPH", "FHR"):
        for values in systems:
            if values[name].shape != at[name].shape or (np.isnan(values[name]) != np.isnan(at[name])).any():
                raise ValueError(f"{name} is defined for other anchors in the two systems; measure both on the same")
    columns = np.stack([values[name] for name in ("FPH", "FHR") for values in systems], axis=1)
    _, rows = np.unique(users, return_inverse=True)
    user_count = int(rows.max(initial=-1)) + 1
    membership = sparse.csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))), shape=(user_count, len(rows)))
    totals = np.concatenate([membership @ np.nan_to_num(columns), membership @ (~np.isnan(columns)).astype(float)], 1)
    first = np.zeros(user_count, bool)
    first[rows] = halves

    # The halves of all users, then of each resample: a user who is drawn often stays in one half.
    drawn = [[totals[half].sum(axis=0, keepdims=True) for half in (first, ~first)]]
    for weights in user_weights(user_count, resamples, seed):
        drawn.append([weights[half].T @ totals[half] for half in (first, ~first)])
    summed = [np.concatenate(half) for half in zip(*drawn, strict=True)]
    with np.errstate(invalid="ignore"):
        means = [half[:, : columns.shape[1]] / half[:, columns.shape[1] :] for half in summed]
    fph, fhr = ([half[:, part] for half in means] for part in np.split(np.arange(columns.shape[1]), 2))
    defined = [half[:, -1] for half in summed]
    undefined = np.isnan(fph[0] + fph[1] + fhr[0] + fhr[1]).any(axis=1)

    def read(points: slice) -> np.ndarray:
        total = np.where(undefined, np.nan, 0.0)
        for choosing, reading in ((0, 1), (1, 0)):
            corners = _corners(fph[choosing][:, points], fhr[choosing][:, points])
            there = _read(fph[reading][:, points], fhr[reading][:, points], corners, fph[reading][:, 0])
            total += defined[reading] * there
        with np.errstate(invalid="ignore"):
            return np.asarray(total / (defined[0] + defined[1]))

    mine, other = read(slice(1, 1 + len(ours))), read(slice(1 + len(ours), None))
    with np.errstate(invalid="ignore"):
        harm = (summed[0][0, 0] + summed[1][0, 0]) / (summed[0][0, columns.shape[1]] + summed[1][0, columns.shape[1]])
    return {
        "FPH": float(harm),
        "FHR": float(other[0]),
        "ours": float(mine[0]),
        **_difference_and_ratio(mine, other),
    }


def _corners(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points are corners of the upper hull of (0, 0) and the points of each row, up to the largest x.

    Shape: x and y (R, P), x >= 0; returns (R, P) bool, False in rows of NaN.
    """
    rows = np.arange(len(x))
    chosen = np.zeros(x.shape, bool)
    # The best of those without harm takes the place of (0, 0).
    best = np.where(x == 0, y, -np.inf).argmax(axis=1)
    harmless = x[rows, best] == 0
    chosen[rows, best] = harmless
    here_x, here_y = np.zeros(len(x)), np.where(harmless, y[rows, best], 0.0)
    # From corner to corner: the next one is where the line to it is steepest.
    for _ in range(x.shape[1]):
        ahead = x > here_x[:, None]
        slopes = np.where(ahead, (y - here_y[:, None]) / np.where(ahead, x - here_x[:, None], 1), -np.inf)
        best = slopes.argmax(axis=1)
        found = ahead[rows, best]
        if not found.any():
            break
        chosen[rows[found], best[found]] = True
        here_x, here_y = (np.where(found, part[rows, best], here) for part, here in ((x, here_x), (y, here_y)))
    return chosen


def _read(x: np.ndarray, y: np.ndarray, chosen: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The lines from (0, 0) through the chosen points of each row by ascending x, level beyond the last.

    Shape: x, y and chosen (R, P), x >= 0; at (R,); returns (R,).
    """
    start = np.zeros((len(x), 1))
    x, y = np.concatenate([start, np.where(chosen, x, np.inf)], axis=1), np.concatenate([start, y], axis=1)
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, axis=1), np.take_along_axis(y, order, axis=1)
    rows = np.arange(len(x))
    left = np.maximum((x <= at[:, None]).sum(axis=1) - 1, 0)
    right = np.minimum(left + 1, x.shape[1] - 1)
    inside = (right > left) & np.isfinite(x[rows, right])
    width = np.where(inside, x[rows, right] - x[rows, left], 1)
    share = np.where(inside, (at - x[rows, left]) / width, 0)
    return np.asarray(y[rows, left] + share * (y[rows, right] - y[rows, left]))


@dataclass(frozen=True)
class _Pool:
    """The predictions of all anchors that somebody rejects or likes later, by descending score.

    Shape: positives and negatives (S, U) sparse: how many of user u's future positives (negatives) are predicted with
    the s-th highest distinct score; all_positives and all_negatives (U,), predicted or not.
    """

    positives: sparse.csr_array
    negatives: sparse.csr_array
    all_positives: np.ndarray
    all_negatives: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, scores: np.ndarray, targets: Targets, users: np.ndarray) -> _Pool:
        count = len(targets.future_negatives)
        if items.shape != scores.shape or len(items) != count or len(users) != count:
            raise ValueError(
                f"predictions have shape {items.shape}, scores {scores.shape} and users {len(users)} rows for {count} "
                "anchors; give one row per anchor and one score per prediction"
            )
        require_distinct(items)
        unknown = (np.isnan(scores) & (items >= 0)).any(axis=1)
        if unknown.any():
            raise ValueError(f"anchor {unknown.argmax()} has a prediction whose score is NaN; score every prediction")

        _, user = np.unique(users, return_inverse=True)
        user_count = int(user.max(initial=-1)) + 1
        liked, rejected = members(targets.future_positives, items), members(targets.future_negatives, items)
        values = np.unique(-scores[liked | rejected])

        def predicted(hits: np.ndarray) -> sparse.csr_array:
            place = np.searchsorted(values, -scores[hits])
            ones = np.ones(len(place))
            return sparse.csr_array((ones, (place, user[np.nonzero(hits)[0]])), shape=(len(values), user_count))

        return cls(
            predicted(liked),
            predicted(rejected),
            np.bincount(user, targets.future_positives.lengths, user_count),
            np.bincount(user, targets.future_negatives.lengths, user_count),
        )


def _point(pool: _Pool, limit: float) -> float:
    return float(_catches(pool, np.ones((len(pool.all_positives), 1)), limit)[0])


def _catches(pool: _Pool, weights: np.ndarray, limit: float) -> np.ndarray:
    """The largest catch with false_block <= limit for each weighting of users: weights (U, R), returns (R,)."""
    allowed = limit * (pool.all_positives @ weights) + _SLACK
    blocked, caught = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    step = max(1, _CHUNK // weights.shape[1])
    for start in range(0, pool.positives.shape[0], step):
        part = slice(start, start + step)
        false_blocks = blocked + np.cumsum(pool.positives[part] @ weights, axis=0)
        # False blocks only grow as scores fall: what is within the limit is a first part of the scores.
        within = false_blocks <= allowed
        caught += (within * (pool.negatives[part] @ weights)).sum(axis=0)
        blocked = false_blocks[-1]
        if not within[-1].any():
            break
    defined = pool.all_positives @ weights > 0
    with np.errstate(invalid="ignore"):
        return np.where(defined, caught / (pool.all_negatives @ weights), np.nan)


def _difference_and_ratio(mine: np.ndarray, other: np.ndarray) -> dict[str, Figure]:
    """Figures of two paired systems, each (1 + R,): the value over all users, then the resamples'."""
    with np.errstate(divide="ignore", invalid="ignore"):
        difference, ratio = mine - other, mine / other
    return {
        "difference": figure_of(float(difference[0]), difference[1:]),
        "ratio": figure_of(float(ratio[0]), ratio[1:]),
    }
