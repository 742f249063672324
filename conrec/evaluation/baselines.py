"""The floors: what a few lines without a language model would block.

    histories = Histories.at(events, anchors)
    for floor in fit_floors(events, settings.timeline.cut_us, item_count, categories, neighbours, settings.seed):
        ranked = floor.rank(histories, histories.distinct(), k=20)

Invariant: a floor is fitted on events at or before the cut, which it cuts off itself; a prediction reads the
fitted arrays and the user's own history up to the anchor, nothing else. All floors rank the same items under the
same exclusions. The strongest is exposure x rejection rate: what the user will be shown, times how readily
everybody rejects it; its exponent trades caught rejections against lost likes, so it is a frontier, not a point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from conrec.feedback.ease import Ease
from conrec.feedback.events import LIKED, REJECTED, SHOWN
from conrec.ragged import Ragged, pairs, ranges

if TYPE_CHECKING:
    from conrec.feedback.anchors import Anchors
    from conrec.feedback.events import Events
    from conrec.feedback.swing import Neighbours

EVERYTHING = (REJECTED, LIKED, SHOWN)
"""All kinds of feedback: whatever the user met."""
EASE_RIDGE = 200.0
"""Ridge of EASE."""
EASE_ITEMS = 15_000
"""EASE inverts an items x items matrix: beyond this many, only the most shown items take part (900 MB)."""
EXPONENTS = (1, 2, 3)
"""Powers of the rejection rate in exposure x rejection rate; power 0 is EASE on everything shown."""

EXPOSURE_LINE = ("EASE on everything shown", *(f"exposure x rejection rate^{exponent}" for exponent in EXPONENTS))
"""The floors that are one system with another exponent, from 0 on."""

FLOORS = (
    "random",
    "most rejected",
    "highest rejection rate",
    "most shown",
    "most rejected category",
    "Swing on negatives",
    "EASE on negatives",
    *EXPOSURE_LINE,
)
"""The names of all floors, in the order in which they are fitted."""

_BLOCK = 1024


@dataclass(frozen=True)
class Histories:
    """What the user of each anchor did up to it.

    Shape: users (A,) int; items A rows of item rows, oldest first; kinds int8 beside items.values.
    """

    users: np.ndarray
    items: Ragged
    kinds: np.ndarray

    @classmethod
    def at(cls, events: Events, anchors: Anchors) -> Histories:
        """The histories of the anchors; events after an anchor are never read."""
        lengths = anchors.ends - anchors.starts
        positions = ranges(anchors.starts, lengths)
        return cls(anchors.users, Ragged.from_lengths(events.items[positions], lengths), events.kinds[positions])

    def __len__(self) -> int:
        return len(self.items)

    def block(self, start: int, stop: int) -> Histories:
        """The anchors start, ..., stop - 1."""
        offsets = self.items.offsets[start : stop + 1]
        inside = slice(offsets[0], offsets[-1])
        items = Ragged(self.items.values[inside], offsets - offsets[0])
        return Histories(self.users[start:stop], items, self.kinds[inside])

    def distinct(self, kinds: tuple[int, ...] = EVERYTHING) -> Ragged:
        """The distinct items of each history that got feedback of these kinds, ascending."""
        chosen = np.isin(self.kinds, kinds)
        items = self.items.values[chosen]
        width = int(items.max(initial=0)) + 1
        rows, distinct = np.divmod(np.unique(pairs(self.items.rows[chosen], items, width)), width)
        return Ragged.from_rows(rows, distinct.astype(np.int32), len(self))

    def matrix(self, item_count: int, kinds: tuple[int, ...] = EVERYTHING) -> sparse.csr_array:
        """`distinct` as a 0/1 matrix of shape (A, I), float32."""
        items = self.distinct(kinds)
        ones = np.ones(len(items.values), np.float32)
        return sparse.csr_array((ones, items.values, items.offsets), shape=(len(self), item_count))


Scores = Callable[[Histories], np.ndarray]
"""Scores of all items for each history, higher first: (A, I) float32, written to by the caller."""


@dataclass(frozen=True)
class Floor:
    """A fitted floor: a name and a score of every item for every history."""

    name: str
    scores: Scores

    def rank(self, histories: Histories, excluded: Ragged, k: int) -> np.ndarray:
        """The k items of highest score that are not excluded, best first; ties as in `best_items`.

        Shape: excluded A rows of item rows; returns (A, k) int32, -1 where fewer than k items are left.
        """
        return best_items(self.scores, histories, excluded, k)[0]


def best_items(scores: Scores, histories: Histories, excluded: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k items of highest score that are not excluded, best first, and their scores, block by block.

    Equal scores stand by item row; which of those that tie for the last places are taken is left to the partition, the
    same in every run. Shape: excluded A rows of item rows; returns (A, k) int32, -1 where fewer than k
    items are left, and (A, k) float32, -inf there.
    """
    items = np.full((len(histories), k), -1, np.int32)
    values = np.full((len(histories), k), -np.inf, np.float32)
    for start in range(0, len(histories), _BLOCK):
        stop = min(start + _BLOCK, len(histories))
        block = scores(histories.block(start, stop))
        forbidden = excluded.values[excluded.offsets[start] : excluded.offsets[stop]]
        block[np.repeat(np.arange(stop - start), excluded.lengths[start:stop]), forbidden] = -np.inf
        items[start:stop] = _top(block, k)
        taken = np.take_along_axis(block, np.maximum(items[start:stop], 0).astype(np.int64), axis=1)
        values[start:stop] = np.where(items[start:stop] >= 0, taken, -np.inf)
    return items, values


def item_scores(scores: Scores, histories: Histories, items: np.ndarray) -> np.ndarray:
    """Scores of given items. Shape: items (A, C) item rows, -1 padding -> (A, C) float32, NaN for padding."""
    values = np.empty(items.shape, np.float32)
    for start in range(0, len(histories), _BLOCK):
        block = scores(histories.block(start, min(start + _BLOCK, len(histories))))
        asked = items[start : start + len(block)]
        values[start : start + len(block)] = np.take_along_axis(block, np.maximum(asked, 0).astype(np.int64), axis=1)
    return np.where(items >= 0, values, np.nan)


def fit_floors(
    events: Events,
    cut_us: int,
    item_count: int,
    categories: np.ndarray | None,
    neighbours: Neighbours,
    seed: int,
) -> Iterator[Floor]:
    """Fits the floors one after the other on the events at or before the cut.

    Shape: categories (I,) int, the category of each item, or None where items have none: that floor is left out.
    `neighbours` are the Swing neighbours, fitted on events before the cut.
    EASE is Steck 2019 (arXiv 1905.03375).
    """
    known = events.times <= cut_us
    per_user = np.bincount(events.rows[known], minlength=len(events.offsets) - 1)
    items = Ragged.from_lengths(events.items[known], per_user)
    past = Histories(np.arange(len(per_user)), items, events.kinds[known])
    # Users, not events: one user who meets an item ten times is one opinion of it.
    rejections = np.bincount(past.distinct((REJECTED,)).values, minlength=item_count)
    shown = np.bincount(past.distinct().values, minlength=item_count)

    yield Floor("random", _random(item_count, len(per_user), seed))
    yield Floor("most rejected", _same_for_all(rejections))
    yield Floor("highest rejection rate", _same_for_all((rejections + 1) / (shown + 20)))
    yield Floor("most shown", _same_for_all(shown))
    if categories is not None:
        yield Floor("most rejected category", _category(categories, rejections))
    yield Floor("Swing on negatives", _swing(neighbours, rejections))
    yield Floor("EASE on negatives", _ease(past, item_count, (REJECTED,)))
    exposure = _ease(past, item_count, EVERYTHING)
    for name, exponent in zip(EXPOSURE_LINE, (0, *EXPONENTS), strict=True):
        rate = ((rejections + 1) / (shown + 5)) ** exponent
        yield Floor(name, _weighted(exposure, rate.astype(np.float32)))


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k highest scores of each row, best first, -1 where the score is -inf; (B, k) int32. Ties as
    in `best_items`."""
    width = min(k, scores.shape[1])
    columns = np.sort(np.argpartition(scores, -width, axis=1)[:, -width:], axis=1)
    best = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    ranked = np.full((len(scores), k), -1, np.int32)
    ranked[:, :width] = np.take_along_axis(np.where(np.isneginf(best), -1, columns), order, axis=1)
    return ranked


def _same_for_all(score: np.ndarray) -> Scores:
    return lambda histories: np.tile(score.astype(np.float32), (len(histories), 1))


def _random(item_count: int, user_count: int, seed: int) -> Scores:
    # One shuffle, entered at another place by every user: each list is uniform, and the same on every call.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(item_count)
    entry = rng.integers(0, item_count, user_count)
    return lambda histories: ((shuffled + entry[histories.users][:, None]) % item_count).astype(np.float32)


def _category(categories: np.ndarray, rejections: np.ndarray) -> Scores:
    """Items of the category that the user rejected most, the most rejected of them first, then the next category."""
    _, category = np.unique(categories, return_inverse=True)
    membership = sparse.csr_array((np.ones(len(category), np.float32), (np.arange(len(category)), category)))
    within = (rejections / (rejections.max(initial=0) + 1)).astype(np.float32)

    def scores(histories: Histories) -> np.ndarray:
        counts = np.asarray((histories.matrix(len(category), (REJECTED,)) @ membership).todense())
        return counts[:, category] + within

    return scores


def _swing(neighbours: Neighbours, rejections: np.ndarray) -> Scores:
    """Summed Swing scores of what the user rejected; where they say nothing, the most rejected items."""
    count = len(rejections)
    near = neighbours.items
    matrix = sparse.csr_array((neighbours.scores.astype(np.float32), near.values, near.offsets), shape=(count, count))
    smallest = matrix.data.min(initial=1.0)
    fallback = (0.5 * smallest * rejections / (rejections.max(initial=0) + 1)).astype(np.float32)

    def scores(histories: Histories) -> np.ndarray:
        return np.asarray((histories.matrix(count, (REJECTED,)) @ matrix).todense()) + fallback

    return scores


def _ease(past: Histories, item_count: int, kinds: tuple[int, ...]) -> Scores:
    """EASE on the items that users met with feedback of these kinds."""
    ease = Ease.fit(past.matrix(item_count, kinds), EASE_RIDGE, EASE_ITEMS)
    return lambda histories: ease.scores(histories.matrix(item_count, kinds))


def _weighted(exposure: Scores, weight: np.ndarray) -> Scores:
    return lambda histories: exposure(histories) * weight
