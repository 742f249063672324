"""Candidate accuracy: does a system pick the item that was rejected among others shown to users the same day?

    candidates = candidate_sets(events, anchors, targets, settings.seed)
    served = accuracy(served_scores(leaves, candidates, trie.item_leaves, vectors), candidates)

Three variants ask the same question of the same sets: `choice` (the candidates listed in the prompt), `likelihood`
(the log-probability of each) and `served` (the largest similarity to what was generated). They are columns of their
own, never mixed.

Invariant: the position of the answer, the user's history and the user's later rejections tell nothing: the answer's
column is random, and no candidate but the answer is in either, the answer not in the history. A day offers its items as
often as users met them, so that the others are as popular as what the day showed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conrec.blocklist.resolve import PAIRS_AT_ONCE, pair_similarities
from conrec.config import DAY_US
from conrec.evaluation.baselines import Histories
from conrec.evaluation.metrics import exclude, members
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import REJECTED, Events
from conrec.feedback.targets import Targets
from conrec.ragged import Ragged, pairs

# Draws per place. Items that a day shows often come again and again; what they leave open is completed exactly.
_SURPLUS = 4
_ANCHORS_AT_ONCE = 1 << 15
_CELLS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Candidates:
    """The next rejection of each anchor, hidden among other items of its day.

    Shape: items (A, C) int32 item rows, distinct in a row, -1 behind them where the day has too few; answer (A,) the
    column of the next rejection, -1 where there is none or the user had met it: then the whole row is -1.
    """

    items: np.ndarray
    answer: np.ndarray


def candidate_sets(events: Events, anchors: Anchors, targets: Targets, seed: int, count: int = 20) -> Candidates:
    """The next rejection of each anchor and count - 1 others, in random columns.

    The others are distinct items of the events of all users on the rejection's UTC day, whatever the feedback, drawn
    with a probability proportional to the number of these events. Items of the anchor's history and its future
    negatives are never among them. Where the next rejection is in the history there is no set: it alone would be.
    Raises ValueError for a count below 2, or when the targets are not what `targets` says of these events and anchors.
    """
    if count < 2:
        raise ValueError(f"{count} candidates leave no choice; ask for 2 or more")
    days = _rejection_days(events, anchors, targets)
    pools = _Pools.of(events, np.unique(days[days >= 0]))
    rng = np.random.default_rng(seed)
    items = np.full((len(anchors), count), -1, np.int32)
    items[:, 0] = targets.next_negative
    has_set = targets.next_negative >= 0
    rejecting = np.flatnonzero(has_set)
    for part in _blocks(len(rejecting), _ANCHORS_AT_ONCE):
        rows = rejecting[part]
        histories = Histories.at(events, anchors.take(rows)).distinct()
        forbidden = _union(histories, targets.future_negatives.take(rows))
        items[rows, 1:] = _draw(pools, np.searchsorted(pools.days, days[rows]), forbidden, count - 1, rng)
        has_set[rows] = ~members(histories, items[rows, :1])[:, 0]
    # Only now, so that the other sets are drawn alike with and without these.
    items[~has_set] = -1

    keys = np.where(items >= 0, rng.random(items.shape), 2)
    order = np.argsort(keys, axis=1)
    answer = np.where(has_set, (order == 0).argmax(axis=1), -1)
    return Candidates(np.take_along_axis(items, order, axis=1), answer)


def described(candidates: Candidates, measured: np.ndarray) -> str:
    """The question in words, and how often a guess is right: more than once in 20 where days show too few items.

    Shape: measured (A,) bool, the anchors that are measured.
    """
    guessed = accuracy(np.zeros(candidates.items.shape), candidates)[measured & (candidates.answer >= 0)]
    chance = f"; a guess is right in {100 * guessed.mean():.3g} %" if len(guessed) else ""
    most = candidates.items.shape[1]
    return f"1 future rejection among {most} items shown the same day, fewer on thin days, drawn by exposure{chance}"


def accuracy(scores: np.ndarray, candidates: Candidates) -> np.ndarray:
    """1 where the answer has the highest score of its set; of n equal highest scores each is right with 1/n.

    Shape: scores (A, C), higher = rather rejected; returns (A,) float64, NaN where there is no answer or no score. A
    single NaN is a candidate that the system cannot name; scores of padding are not read.
    Raises ValueError when the shapes disagree.
    """
    if scores.shape != candidates.items.shape:
        raise ValueError(f"scores have shape {scores.shape} for candidates of shape {candidates.items.shape}")
    scores = np.where(candidates.items >= 0, scores, np.nan)
    # fmax passes over NaN without a warning.
    highest = np.fmax.reduce(scores, axis=1)
    tied = (scores == highest[:, None]).sum(axis=1)
    own = np.take_along_axis(scores, np.maximum(candidates.answer, 0)[:, None], axis=1)[:, 0]
    share = (own == highest) / np.maximum(tied, 1)
    return np.where((candidates.answer >= 0) & ~np.isnan(highest), share, np.nan)


def served_scores(
    leaves_served: Ragged, candidates: Candidates, item_leaves: np.ndarray, vectors: np.ndarray
) -> np.ndarray:
    """The largest similarity of each candidate to what was generated for its anchor.

    Shape: leaves_served A rows of leaves; item_leaves (I,) leaf of each item row; vectors (M, D) from `leaf_vectors`;
    returns (A, C) float32, -inf where nothing was generated, NaN for padding.
    """
    known = candidates.items >= 0
    scores = np.where(known, np.float32(-np.inf), np.float32(np.nan))
    width = int(leaves_served.lengths.max(initial=0))
    if width == 0:
        return scores
    for part in _blocks(len(known), PAIRS_AT_ONCE // (known.shape[1] * width)):
        served = leaves_served.take(np.arange(part.start, part.stop)).padded(-1)[:, None, :]
        leaves = item_leaves[candidates.items[part]][:, :, None]
        left, right = np.broadcast_arrays(leaves, served)
        similarities = pair_similarities(vectors, left.ravel(), right.ravel()).reshape(left.shape)
        similarities[right < 0] = -np.inf
        scores[part] = np.where(known[part], similarities.max(axis=2, initial=-np.inf), np.nan)
    return scores


@dataclass(frozen=True)
class _Pools:
    """What each day showed.

    Shape: days (D,) days since 1970, ascending; met D rows of item rows, one for every event; items D rows of the
    distinct item rows; exposures beside items.values, the events of each.
    """

    days: np.ndarray
    met: Ragged
    items: Ragged
    exposures: np.ndarray

    @classmethod
    def of(cls, events: Events, days: np.ndarray) -> _Pools:
        event_days = events.times // DAY_US
        used = np.isin(event_days, days)
        place = np.searchsorted(days, event_days[used])
        order = np.argsort(place, kind="stable")
        met = Ragged.from_rows(place[order], events.items[used][order], len(days))
        width = int(met.values.max(initial=0)) + 1
        keys, exposures = np.unique(pairs(met.rows, met.values, width), return_counts=True)
        items = Ragged.from_rows(keys // width, (keys % width).astype(np.int32), len(days))
        return cls(days, met, items, exposures)


def _rejection_days(events: Events, anchors: Anchors, targets: Targets) -> np.ndarray:
    """UTC day of each anchor's next rejection, -1 where there is none."""
    rejected = np.append(np.flatnonzero(events.kinds == REJECTED), len(events))
    position = rejected[np.searchsorted(rejected, anchors.ends)]
    exists = position < anchors.window_ends
    next_negative = np.full(len(anchors), -1, np.int64)
    next_negative[exists] = events.items[position[exists]]
    if not np.array_equal(next_negative, targets.next_negative):
        raise ValueError("the targets are those of other events or anchors; make them with targets(events, anchors)")
    days = np.full(len(anchors), -1, np.int64)
    days[exists] = events.times[position[exists]] // DAY_US
    return days


def _draw(pools: _Pools, day: np.ndarray, forbidden: Ragged, count: int, rng: np.random.Generator) -> np.ndarray:
    """For each row `count` distinct allowed items of its day, drawn by exposure, -1 behind them where it has fewer.

    Shape: day (B,) positions in pools.days; forbidden B rows of item rows; returns (B, count) int32.
    """
    events_of_day = pools.met.lengths[day][:, None]
    drawn = rng.integers(0, events_of_day, (len(day), _SURPLUS * count)) + pools.met.offsets[day][:, None]
    first = _without_repeats(pools.met.values[drawn])
    result = exclude(first, forbidden, count)
    lacking = np.flatnonzero(result[:, -1] < 0)
    widest = int(pools.items.lengths.max(initial=1))
    for part in _blocks(len(lacking), _CELLS_AT_ONCE // widest):
        rows = lacking[part]
        result[rows] = _complete(pools, day[rows], forbidden.take(rows), result[rows], rng)
    return result


def _complete(
    pools: _Pools, day: np.ndarray, forbidden: Ragged, found: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Goes on drawing where the first draws left places open, from the allowed items that were not found yet.

    Had the draws been endless, the items would arrive in the order of exponential waiting times with the exposures as
    rates; so these times are drawn instead, and no item is too rare to come.
    """
    items = pools.items.take(day).padded(-1)
    exposures = Ragged(pools.exposures, pools.items.offsets).take(day).padded(1)
    waiting = rng.exponential(size=items.shape) / exposures
    taken = Ragged.from_lengths(found[found >= 0], (found >= 0).sum(axis=1))
    closed = (items < 0) | members(forbidden, items) | members(taken, items)
    waiting[closed] = np.inf
    order = np.argsort(waiting, axis=1)
    arriving = np.take_along_axis(np.where(closed, -1, items), order, axis=1)
    nothing = Ragged(found[:0, 0], np.zeros(len(found) + 1, np.int64))
    return exclude(np.concatenate([found, arriving], axis=1), nothing, found.shape[1])


def _without_repeats(items: np.ndarray) -> np.ndarray:
    """Each row with -1 in place of an item that it held before."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    result = np.empty_like(items)
    np.put_along_axis(result, order, ordered, axis=1)
    return result


def _union(one: Ragged, other: Ragged) -> Ragged:
    """The values of both in each row."""
    rows = np.concatenate([one.rows, other.rows])
    order = np.argsort(rows, kind="stable")
    return Ragged.from_rows(rows[order], np.concatenate([one.values, other.values])[order], len(one))


def _blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows, of one row at the least."""
    step = max(1, size)
    yield from (slice(start, min(start + step, count)) for start in range(0, count, step))
