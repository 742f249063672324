"""From generated semantic IDs to catalogue items: everything at least theta similar to what the model generated.

    vectors = leaf_vectors(codebook, trie)
    resolution = resolve(distinct_leaves, trie, vectors, theta)
    found = near(generated, resolution)

Invariant: the work is bounded by the number of distinct IDs, not of users: each ID is resolved once, and users are
joined to the result. A similarity is a function of the two IDs alone (`pair_similarities`), whatever batch, index or
machine found the pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conrec import ragged
from conrec.catalogue.neighbours import NearIndex
from conrec.errors import ArtefactError
from conrec.ragged import Ragged, ranges

if TYPE_CHECKING:
    from conrec.catalogue.codebook import Codebook
    from conrec.catalogue.trie import Trie

PAIRS_AT_ONCE = 1 << 19
"""Pairs of (generated ID, item) expanded at a time; about 32 bytes each."""
_VECTORS_AT_ONCE = 1 << 16
_QUERIES_AT_ONCE = 1 << 12
# FAISS sums float32 in an order of its own; candidates within this of theta are decided by pair_similarities.
_SLACK = 1e-4


@dataclass(frozen=True)
class Resolution:
    """The items that each distinct generated ID catches, the most similar first.

    Shape: leaves (Q,) int64 ascending; items: Q rows of item rows, int32; similarities (N,) float32 beside
    items.values.
    """

    leaves: np.ndarray
    items: Ragged
    similarities: np.ndarray


@dataclass(frozen=True)
class Near:
    """What lies near the generated IDs of a block of users: each (user, item) once, sorted by user, then item.

    Shape: all (N,). rows int64, position of the user in the block; items int32 item rows; similarities float32, the
    largest over the user's IDs; leaves int64, the ID that has it (the most probable of equals).
    """

    rows: np.ndarray
    items: np.ndarray
    similarities: np.ndarray
    leaves: np.ndarray


@dataclass(frozen=True)
class Predicted:
    """What passes the threshold for a block of users: each (user, item) once, sorted by user, then item.

    Shape: all (N,). rows int64, position of the user in the block; items int32 item rows; scores float32 in (0, 1);
    similarities float32, to the nearest generated ID, 0 where none is near; leaves int64, that ID or the item's own.
    """

    rows: np.ndarray
    items: np.ndarray
    scores: np.ndarray
    similarities: np.ndarray
    leaves: np.ndarray

    def take(self, which: np.ndarray) -> Predicted:
        """The pairs that a mask or positions name."""
        return Predicted(
            self.rows[which], self.items[which], self.scores[which], self.similarities[which], self.leaves[which]
        )


def leaf_vectors(codebook: Codebook, trie: Trie) -> np.ndarray:
    """Unit vectors of all catalogue IDs, whose dot product is the similarity. Shape: (M, D) float32."""
    return np.ascontiguousarray(codebook.similarity_vectors(trie.semantic_ids), np.float32)


def pair_similarities(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The similarity of leaves left[i] and right[i]; exactly 1 where they are the same.

    Shape: vectors (M, D) float32, left and right (N,) leaves; returns (N,) float32 in [-1, 1].
    """
    result = np.empty(len(left), np.float32)
    for start in range(0, len(left), _VECTORS_AT_ONCE):
        part = slice(start, start + _VECTORS_AT_ONCE)
        # Summed in float64 the error is far below float32's resolution: the rounded value cannot depend on the batch.
        dots = np.einsum("nd,nd->n", vectors[left[part]].astype(np.float64), vectors[right[part]].astype(np.float64))
        result[part] = np.clip(dots, -1, 1)
    result[left == right] = 1
    return result


def resolve(leaves: np.ndarray, trie: Trie, vectors: np.ndarray, theta: float) -> Resolution:
    """All items whose ID is at least `theta` similar to each of the leaves; beyond `FLAT_IDS` catalogue IDs nearly all
    (conrec/catalogue/neighbours.py).

    Shape: leaves (Q,) distinct, ascending; vectors (M, D) from `leaf_vectors`. A theta above 1 catches nothing.
    Raises `MissingDependencyError` without FAISS.
    """
    leaves = np.asarray(leaves, np.int64)
    if len(leaves) == 0 or not theta <= 1:
        return Resolution(leaves, Ragged.from_lengths(np.empty(0, np.int32), np.zeros(len(leaves), np.int64)), _NONE)
    index = NearIndex(vectors)
    parts = [
        _neighbours(index, vectors, leaves[start : start + _QUERIES_AT_ONCE], np.float32(theta))
        for start in range(0, len(leaves), _QUERIES_AT_ONCE)
    ]
    counts = np.concatenate([part[0] for part in parts])
    neighbours = np.concatenate([part[1] for part in parts])
    similarities = np.concatenate([part[2] for part in parts])

    items = trie.leaf_items.take(neighbours)
    query = np.repeat(np.repeat(np.arange(len(leaves)), counts), items.lengths)
    return Resolution(
        leaves,
        Ragged.from_rows(query, items.values.astype(np.int32), len(leaves)),
        np.repeat(similarities, items.lengths),
    )


_NONE = np.empty(0, np.float32)


def _neighbours(
    index: NearIndex, vectors: np.ndarray, leaves: np.ndarray, theta: np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leaves at least theta similar to each query, similarity descending, equals by leaf.

    Shape: leaves (Q,); returns counts (Q,), and of all queries together leaves (N,) and similarities (N,) float32.
    """
    rows, neighbours = index.pairs(vectors[leaves], float(theta) - _SLACK)
    similarities = pair_similarities(vectors, leaves[rows], neighbours)
    keep = similarities >= theta
    rows, neighbours, similarities = rows[keep], neighbours[keep], similarities[keep]
    order = np.lexsort((neighbours, -similarities, rows))
    return np.bincount(rows, minlength=len(leaves)), neighbours[order], similarities[order]


def near(generated: Ragged, resolution: Resolution) -> Near:
    """Joins a block of users to the resolution: for each item the largest similarity and the ID that has it.

    Shape: generated: B rows of leaves, the most probable first. Memory is bounded whatever the block, apart from the
    result. Raises `ArtefactError` when a leaf was not resolved.
    """
    place = np.searchsorted(resolution.leaves, generated.values)
    known = place < len(resolution.leaves)
    known[known] = resolution.leaves[place[known]] == generated.values[known]
    if not known.all():
        leaf = generated.values[int(np.argmin(known))]
        raise ArtefactError(f"generated leaf {leaf} is not among the resolved ones; resolve all generated leaves first")
    caught = resolution.items.lengths[place]
    per_user = np.diff(np.concatenate(([0], np.cumsum(caught)))[generated.offsets])
    parts = [_join(generated, resolution, place, caught, users) for users in _chunks(per_user)]
    return Near(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _join(
    generated: Ragged,
    resolution: Resolution,
    place: np.ndarray,
    caught: np.ndarray,
    users: slice,
) -> tuple[np.ndarray, ...]:
    entries = np.arange(generated.offsets[users.start], generated.offsets[users.stop])
    rows = np.repeat(np.arange(users.start, users.stop), generated.lengths[users])
    lengths = caught[entries]
    reached = ranges(resolution.items.offsets[place[entries]], lengths)
    entries, rows = np.repeat(entries, lengths), np.repeat(rows, lengths)
    items, similarities = resolution.items.values[reached], resolution.similarities[reached]
    # Sorted by user, item, then rank of the ID, all in one number: one fast sort instead of three.
    width, item_span = int(generated.lengths.max(initial=0)), int(items.max(initial=0)) + 1
    ranks = entries - generated.offsets[rows]
    keys = ragged.pairs(ragged.pairs(rows - users.start, items, item_span), ranks, width)
    order = np.argsort(keys)
    pairs_of = keys[order] // max(width, 1)
    starts = np.flatnonzero(np.diff(pairs_of, prepend=-1))
    similarities = similarities[order]
    best = np.maximum.reduceat(similarities, starts) if len(starts) else similarities
    # The first of the equally similar IDs of a user was generated first: it is the most probable.
    groups = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    winners = np.flatnonzero(similarities == best[groups])
    winners = winners[np.flatnonzero(np.diff(groups[winners], prepend=-1))]
    chosen = order[winners]
    return rows[chosen], items[chosen], best, generated.values[entries[chosen]]


def _chunks(costs: np.ndarray) -> Iterator[slice]:
    """Consecutive ranges of rows whose costs sum to about PAIRS_AT_ONCE; at least one range, at least one row each."""
    ends = np.cumsum(costs)
    start = 0
    while True:
        spent = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, spent + PAIRS_AT_ONCE, side="right")))
        yield slice(start, min(stop, len(costs)))
        start = stop
        if start >= len(costs):
            return
