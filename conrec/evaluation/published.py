"""Headline measures of the list as published: what it catches, what it blocks wrongly, and how well it orders pairs.

    pairs = shown_pairs(events, anchors)
    catch_at(scores, pairs)[0.05]               # {"value": .31, "low": .29, "high": .33}
    at_threshold(scores, pairs, thresholds)     # catch, false_block, false_block_per_user, selectivity
    paired(ours, theirs, pairs).catch_ratio[0.05]
    auc(scores, pairs.where(shown_before[pairs.items] < 5))

A pair is a served list and an item that its user met for the first time in the window and then rejected or liked.
Its score is the one at which the list would hold the item, larger blocked earlier, -inf where no threshold brings it
in (a cap or a guardrail keeps it out). A list at threshold t blocks the pairs with score >= t that are not -inf.

Invariants: scores come from outside and outcomes from the window alone. Pairs of equal score are blocked together or
not at all. Every interval is a 95 % bootstrap over users, in which a threshold that is chosen is chosen anew; calls
with the same pairs, resamples and seed see the same resamples. A measure of which a side is empty is NaN.

| measure | what it is | by chance |
|---|---|---|
| catch | blocked share of the rejected pairs | the blocked share of all pairs |
| false_block | blocked share of the liked pairs | the same |
| false_block_per_user | mean over the lists with a liked pair of the blocked share of their liked pairs | the same |
| selectivity | catch / false_block | 1 |
| AUC | a rejected pair scores above a liked one, ties count half | 1/2 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from conrec.evaluation.metrics import Figure, figure_of, resampled_means, user_weights
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import REJECTED, SHOWN, Events
from conrec.feedback.outcomes import first_meetings

SHARES = (0.01, 0.05, 0.10)
"""False blocks at which catch is told."""

Measure = Callable[[np.ndarray], np.ndarray]
"""From weights of users (R, U), a resample a row, to values (R, columns)."""

# This many (resample, pair) weights are held at once: 4 MiB, which stays in the cache.
_CHUNK = 500_000
# A share of 7 % of 100 likes allows 7 of them, although .07 x 100 is a little more or less in floating point.
_SLACK = 1e-9


@dataclass(frozen=True)
class Pairs:
    """Served lists with the items that their users met first in the window, and what they made of them.

    Shape: users (N,) row of the served list, 0 to U - 1; items (N,) int32 item rows; rejected (N,) bool, False for
    liked; owners (N,) the user of the list, one draw in a resample: None where every list has a user of its own.
    Raises ValueError when lengths disagree.
    """

    users: np.ndarray
    items: np.ndarray
    rejected: np.ndarray
    owners: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("items", "rejected", "owners"):
            column = getattr(self, name)
            if column is not None and len(column) != len(self.users):
                raise ValueError(f"{name} has {len(column)} values for {len(self.users)} pairs; give one per pair")

    def __len__(self) -> int:
        return len(self.users)

    @property
    def bootstrap_users(self) -> np.ndarray:
        """The user that is drawn for each pair, shape (N,)."""
        return self.users if self.owners is None else self.owners

    def where(self, mask: np.ndarray) -> Pairs:
        """The pairs that the mask (N,) names; their scores are `scores[mask]`."""
        owners = None if self.owners is None else self.owners[mask]
        return Pairs(self.users[mask], self.items[mask], self.rejected[mask], owners)


@dataclass(frozen=True)
class Paired:
    """Ours against theirs: differences ours - theirs, ratios ours / theirs; catch by its false block."""

    auc_difference: Figure
    within_user_auc_difference: Figure
    catch_difference: dict[float, Figure]
    catch_ratio: dict[float, Figure]


def shown_pairs(events: Events, anchors: Anchors) -> Pairs:
    """Each anchor with the items of its window that have no event of its user with time <= t, by anchor and item.

    Rejected: at least once, and never liked in the window; liked: at least once. Items that are merely shown are no
    pairs. `users` are the positions of the anchors, `owners` their users.
    """
    outcomes = first_meetings(events, anchors)
    answered = outcomes.take(outcomes.kinds != SHOWN)
    rejected = answered.kinds == REJECTED
    return Pairs(answered.anchors.astype(np.int32), answered.items, rejected, anchors.users[answered.anchors])


def catch_at(
    scores: np.ndarray, pairs: Pairs, shares: Sequence[float] = SHARES, *, resamples: int = 1000, seed: int = 0
) -> dict[float, Figure]:
    """The largest catch of any threshold whose false_block is at most each share.

    Shape: scores (N,). Raises ValueError when a score is missing or NaN.
    """
    value, drawn = _bootstrapped([_catches(scores, pairs, shares)], pairs, resamples, seed)
    return {share: figure_of(value[place], drawn[:, place]) for place, share in enumerate(shares)}


def catch_curve(
    scores: np.ndarray, pairs: Pairs, shares: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """`catch_at` over a grid of shares (G,), for drawing: value, low and high, each (G,)."""
    value, drawn = _bootstrapped([_catches(scores, pairs, shares)], pairs, resamples, seed)
    figures = [figure_of(*column) for column in zip(value, drawn.T, strict=True)]
    return {end: np.array([figure[end] for figure in figures]) for end in ("value", "low", "high")}


def at_threshold(
    scores: np.ndarray, pairs: Pairs, thresholds: np.ndarray | float, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """catch, false_block, false_block_per_user and selectivity of lists that stop at the given thresholds.

    Shape: scores (N,); thresholds a number or (N,) the one of each pair's list, compared in the precision of the
    scores. selectivity is infinite where only rejected pairs are blocked, NaN where nothing is.
    Raises ValueError when shapes disagree or a score or threshold is NaN.
    """
    scores = _checked(scores, pairs)
    limits = np.asarray(thresholds).astype(scores.dtype)
    if limits.shape not in ((), scores.shape) or np.isnan(limits).any():
        raise ValueError(f"thresholds have shape {limits.shape} for {len(pairs)} pairs; give numbers, one or one each")
    blocked = (scores >= limits) & (scores > -np.inf)
    lists, first, row = np.unique(np.where(pairs.rejected, -1, pairs.users), return_index=True, return_inverse=True)
    with np.errstate(invalid="ignore"):
        share = np.bincount(row, blocked, len(lists)) / np.bincount(row, minlength=len(lists))
    # The mean over the lists, although values are by pair: a list's share stands at its first liked pair.
    by_list = np.full(len(pairs), np.nan)
    by_list[first[lists >= 0]] = share[lists >= 0]
    values = {
        "catch": np.where(pairs.rejected, blocked, np.nan),
        "false_block": np.where(pairs.rejected, np.nan, blocked),
        "false_block_per_user": by_list,
    }
    point, drawn = resampled_means(values, pairs.bootstrap_users, resamples, seed)
    figures = {name: figure_of(point[name], drawn[name]) for name in values}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(point["catch"], point["false_block"])
        ratios = drawn["catch"] / drawn["false_block"]
    return {**figures, "selectivity": figure_of(float(ratio), ratios)}


def auc(scores: np.ndarray, pairs: Pairs, *, resamples: int = 1000, seed: int = 0) -> Figure:
    """The probability that a rejected pair scores above a liked one, of any users; ties, -inf among them, count half.

    Shape: scores (N,). Raises ValueError when a score is missing or NaN.
    """
    value, drawn = _bootstrapped([_area(scores, pairs)], pairs, resamples, seed)
    return figure_of(value[0], drawn[:, 0])


def within_user_auc(scores: np.ndarray, pairs: Pairs, *, resamples: int = 1000, seed: int = 0) -> Figure:
    """`auc` over the comparisons of two pairs of one list: what telling users apart cannot gain.

    A list weighs as many comparisons as it has. Shape and errors as in `auc`.
    """
    value, drawn = _bootstrapped([_within_area(scores, pairs)], pairs, resamples, seed)
    return figure_of(value[0], drawn[:, 0])


def area(scores: np.ndarray, rejected: np.ndarray) -> float:
    """The value of `auc` alone. Shape: scores (N,), rejected (N,) bool."""
    rows = np.arange(len(scores))
    pairs = Pairs(rows, rows, rejected, np.zeros(len(rows), np.int64))
    return float(_bootstrapped([_area(scores, pairs)], pairs, 0, 0)[0][0])


def paired(
    ours: np.ndarray,
    theirs: np.ndarray,
    pairs: Pairs,
    shares: Sequence[float] = SHARES,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Paired:
    """Two systems on the same pairs and the same resamples, so that what makes a user easy for both cancels.

    Shape: ours and theirs (N,) scores, each on a scale of its own. Each system has a threshold of its own at each
    share. A ratio is infinite where theirs catches nothing, NaN where neither does. Errors as in `auc`.
    """
    measures = [
        measure
        for scores in (ours, theirs)
        for measure in (_area(scores, pairs), _within_area(scores, pairs), _catches(scores, pairs, shares))
    ]
    value, drawn = _bootstrapped(measures, pairs, resamples, seed)
    mine, other = np.split(np.concatenate([value[None], drawn]), 2, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        differences = [figure_of(column[0], column[1:]) for column in (mine - other).T]
        ratios = [figure_of(column[0], column[1:]) for column in (mine / other).T]
    catch_differences, catch_ratios = (dict(zip(shares, part[2:], strict=True)) for part in (differences, ratios))
    return Paired(differences[0], differences[1], catch_differences, catch_ratios)


def list_lengths(
    lengths: np.ndarray, users: np.ndarray | None = None, *, resamples: int = 1000, seed: int = 0
) -> dict[str, Figure]:
    """p5, p50, p95 and mean of the lists' lengths, in items, and none: the share of lists without an item.

    A percentile is the shortest length that this share of the lists does not exceed. Shape: lengths (U,) int;
    users (U,) of the lists, drawn in a resample, None where every list has a user of its own.
    Raises ValueError when lengths disagree.
    """
    if users is not None and len(users) != len(lengths):
        raise ValueError(f"users has {len(users)} values for {len(lengths)} lists; give one per list")
    values, place = np.unique(lengths, return_inverse=True)
    owner, user_count = _numbered(np.arange(len(lengths)) if users is None else users)
    counts = sparse.csr_array((np.ones(len(place)), (place, owner)), shape=(len(values), user_count))

    def figures(weights: np.ndarray) -> np.ndarray:
        lists = counts @ weights
        reached = np.cumsum(lists, axis=0)
        total = np.maximum(reached[-1], 1)
        percentiles = [values[(reached >= q * total - _SLACK).argmax(axis=0)] for q in (0.05, 0.5, 0.95)]
        return np.stack([*percentiles, values @ lists / total, (values == 0) @ lists / total], axis=1)

    names = ("p5", "p50", "p95", "mean", "none")
    if not len(lengths):
        return {name: figure_of(np.nan, np.zeros(0)) for name in names}
    value = figures(np.ones((user_count, 1)))[0]
    drawn = np.concatenate([np.zeros((0, 5)), *map(figures, user_weights(user_count, resamples, seed))])
    return {name: figure_of(value[column], drawn[:, column]) for column, name in enumerate(names)}


def _checked(scores: np.ndarray, pairs: Pairs) -> np.ndarray:
    scores = np.asarray(scores)
    scores = scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float64)
    if scores.shape != (len(pairs),):
        raise ValueError(f"scores have shape {scores.shape} for {len(pairs)} pairs; give one per pair")
    if np.isnan(scores).any():
        raise ValueError(f"the score of pair {np.isnan(scores).argmax()} is NaN; give -inf to what is never blocked")
    return scores


def _numbered(users: np.ndarray) -> tuple[np.ndarray, int]:
    """Users as numbers from 0, (N,) int64, and how many there are."""
    distinct, number = np.unique(users, return_inverse=True)
    return number, len(distinct)


def _bootstrapped(
    measures: Sequence[Measure], pairs: Pairs, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Measures over all users (M,), and over each resample (resamples, M), in columns side by side."""
    user_count = _numbered(pairs.bootstrap_users)[1]
    step = max(1, _CHUNK // max(len(pairs), 1))

    def values(weights: np.ndarray) -> np.ndarray:
        return np.concatenate([measure(weights) for measure in measures], axis=1)

    value = values(np.ones((1, user_count)))
    drawn = [np.zeros((0, value.shape[1]))]
    for weights in user_weights(user_count, resamples, seed):
        for start in range(0, weights.shape[1], step):
            # A resample in a row: its weights are gathered and summed where they lie side by side.
            drawn.append(values(np.ascontiguousarray(weights[:, start : start + step].T)))
    return value[0], np.concatenate(drawn)


def _cumulated(weights: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Weight of the first n pairs, n = 0 to N. Shape: weights (R, U), users (N,) of the pairs; returns (R, N + 1)."""
    sums = np.zeros((len(weights), len(users) + 1))
    np.cumsum(np.take(weights, users, axis=1), axis=1, out=sums[:, 1:])
    return sums


def _sides(scores: np.ndarray, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Negated scores, ascending, and user numbers: of the liked pairs, then of the rejected ones."""
    scores = -_checked(scores, pairs)
    owner, _ = _numbered(pairs.bootstrap_users)
    order = np.argsort(scores, kind="stable")
    liked, rejected = order[~pairs.rejected[order]], order[pairs.rejected[order]]
    return scores[liked], owner[liked], scores[rejected], owner[rejected]


def _area(scores: np.ndarray, pairs: Pairs) -> Measure:
    """AUC, one column.

    Ranked once: how many liked pairs lie before each rejected one is the same in every resample, only what they weigh
    is not.
    """
    liked_scores, liked, rejected_scores, rejected = _sides(scores, pairs)
    above = np.searchsorted(liked_scores, rejected_scores, side="left")
    not_below = np.searchsorted(liked_scores, rejected_scores, side="right")

    def measure(weights: np.ndarray) -> np.ndarray:
        sums, weighed = _cumulated(weights, liked), np.take(weights, rejected, axis=1)
        total = sums[:, -1:]
        beaten = total - (np.take(sums, above, axis=1) + np.take(sums, not_below, axis=1)) / 2
        with np.errstate(invalid="ignore"):
            return np.einsum("ri,ri->r", beaten, weighed)[:, None] / (total * weighed.sum(axis=1, keepdims=True))

    return measure


def _within_area(scores: np.ndarray, pairs: Pairs) -> Measure:
    """AUC within lists, one column: a ratio of sums over users."""
    row, row_count = _numbered(pairs.users)
    owner, user_count = _numbered(pairs.bootstrap_users)
    values, rank = np.unique(_checked(scores, pairs), return_inverse=True)
    # A list's pairs are a range of these keys, in it ordered by score.
    keys = row * max(len(values), 1) + rank
    liked, rejected = np.sort(keys[~pairs.rejected]), keys[pairs.rejected]
    starts = np.searchsorted(liked, row[pairs.rejected] * max(len(values), 1))
    beaten = (np.searchsorted(liked, rejected, "left") + np.searchsorted(liked, rejected, "right")) / 2 - starts
    compared = np.bincount(row[~pairs.rejected], minlength=row_count)[row[pairs.rejected]]
    sums = np.stack([np.bincount(owner[pairs.rejected], part, user_count) for part in (beaten, compared)], axis=1)

    def measure(weights: np.ndarray) -> np.ndarray:
        won, out_of = (weights @ sums).T
        with np.errstate(invalid="ignore"):
            return (won / out_of)[:, None]

    return measure


def _catches(scores: np.ndarray, pairs: Pairs, shares: Sequence[float] | np.ndarray) -> Measure:
    """The largest catch at each share, a column each."""
    liked_scores, liked, rejected_scores, rejected = _sides(scores, pairs)
    blockable = int(np.searchsorted(liked_scores, np.inf))
    # When the first n liked pairs may be blocked and no more, so may the rejected ones above liked pair n + 1 be.
    free = np.searchsorted(rejected_scores, np.append(liked_scores[:blockable], np.inf))

    def measure(weights: np.ndarray) -> np.ndarray:
        blocked, caught = _cumulated(weights, liked), _cumulated(weights, rejected)
        allowed = np.floor(np.multiply.outer(blocked[:, -1], np.asarray(shares, float)) + _SLACK)
        within = [
            np.searchsorted(*row, side="right") - 1 for row in zip(blocked[:, : blockable + 1], allowed, strict=True)
        ]
        found = np.take_along_axis(caught, free[np.stack(within)], axis=1)
        with np.errstate(invalid="ignore"):
            return np.where(blocked[:, -1:] > 0, found / caught[:, -1:], np.nan)

    return measure
