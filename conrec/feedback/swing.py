"""Collaborative neighbours on the graph of rejections: Swing.

    swing(i, j) = gate(i, j) / sqrt(N_j) * sum over u != v in U_i and U_j of w_u w_v / (alpha2 + |I_u and I_v|)
    w_u = 1 / (alpha1 + |I_u|)^theta,   gate = 1 if |U_i and U_j| > min_support, else 0

I_u are the items that u rejected, U_i the users that rejected i, N_j the rejections of j. The sum takes each pair
in both orders. Formula: Swing (Yang et al., arXiv 2010.05525) on rejections, with the user weights of its open
implementations.

Invariant: what is fitted on `events.before(cut)` knows nothing after the cut, and memory is bounded by the block
sizes below, whatever the data. For each item i only a sample of `max_users_per_item` of its users enters U_i;
I_u, N_j and the users of j stay whole, so that the order of the neighbours of i is estimated without bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from conrec.config import SwingSettings
from conrec.feedback.events import REJECTED, Events
from conrec.ragged import Ragged, blocks, pairs, places, ranges

_BLOCK_EDGES = 1 << 22
_BLOCK_PAIRS = 1 << 22


@dataclass(frozen=True)
class Neighbours:
    """Swing neighbours of each item row, best first.

    Shape: items I rows of item rows, E in all; scores (E,) float32; supports (E,) int32, the common users that
    the score was computed from; covered_share the share of the I items with at least one neighbour.
    """

    items: Ragged
    scores: np.ndarray
    supports: np.ndarray
    covered_share: float


@dataclass(frozen=True)
class _Graph:
    """Who rejected what, each pair once: items_of_user U rows ascending, users_of_item I sampled rows."""

    items_of_user: Ragged
    users_of_item: Ragged
    weights: np.ndarray
    rejections: np.ndarray


def swing_neighbours(events: Events, item_count: int, settings: SwingSettings, seed: int) -> Neighbours:
    """The best `settings.neighbours` neighbours of each item, from the rejections among the events.

    `events` must end at the training cut. Ties of the score go to the lower item row. Deterministic for a seed.
    """
    graph = _rejection_graph(events, item_count, settings, seed)
    of_blocks = [_block_neighbours(graph, block, settings) for block in _item_blocks(graph)]
    empty = np.zeros(0, np.int64)
    rows, items, scores, supports = (
        np.concatenate([empty, *part]) for part in (zip(*of_blocks, strict=True) if of_blocks else [()] * 4)
    )
    neighbours = Ragged.from_rows(rows, items.astype(np.int32), item_count)
    covered = float(np.mean(neighbours.lengths > 0)) if item_count else 0.0
    return Neighbours(neighbours, scores.astype(np.float32), supports.astype(np.int32), covered)


def _rejection_graph(events: Events, item_count: int, settings: SwingSettings, seed: int) -> _Graph:
    rejected = events.kinds == REJECTED
    user_count = len(events.users)
    keys = np.unique(pairs(events.rows[rejected], events.items[rejected], max(item_count, 1)))
    users, items = keys // max(item_count, 1), (keys % max(item_count, 1)).astype(np.int32)
    items_of_user = Ragged.from_rows(users, items, user_count)
    # A random order of each item's users, of which the first ones are its sample; then ascending for locality.
    shuffled = np.lexsort((np.random.default_rng(seed).random(len(keys)), items))
    counts = np.bincount(items, minlength=item_count)
    taken = np.minimum(counts, settings.max_users_per_item)
    sampled = shuffled[ranges(np.cumsum(counts) - counts, taken)]
    order = np.lexsort((users[sampled], items[sampled]))
    return _Graph(
        items_of_user,
        Ragged.from_lengths(users[sampled][order], taken),
        (settings.alpha1 + items_of_user.lengths) ** -settings.theta,
        np.bincount(events.items[rejected], minlength=item_count),
    )


def _item_blocks(graph: _Graph) -> Iterator[np.ndarray]:
    """Ranges of items with about equal work: edges to follow, or pairs of users to count."""
    users = graph.users_of_item
    reach = np.concatenate(([0], np.cumsum(graph.items_of_user.lengths[users.values])))
    edges, meetings = reach[users.offsets], np.concatenate(([0], np.cumsum(users.lengths**2)))
    work = np.maximum(edges / _BLOCK_EDGES, meetings / _BLOCK_PAIRS)
    borders = np.searchsorted(work, np.arange(1, int(work[-1]) + 1))
    borders = np.unique(np.concatenate(([0], borders, [len(users)])))
    for first, last in zip(borders[:-1], borders[1:], strict=True):
        yield np.arange(first, last)


def _block_neighbours(graph: _Graph, block: np.ndarray, settings: SwingSettings) -> tuple[np.ndarray, ...]:
    """Neighbours of a block of items: item rows, neighbour rows, scores, supports; best first within an item."""
    # 1. Follow item -> its users -> their other items. A place is a user's position among the item's users.
    users = graph.users_of_item.take(block)
    reached = graph.items_of_user.take(users.values)
    place = np.repeat(places(users.lengths), reached.lengths)
    local = np.repeat(users.rows, reached.lengths)
    other = reached.values != block[local]
    place, local, item = place[other], local[other], reached.values[other]
    weight = np.repeat(graph.weights[users.values], reached.lengths)[other]

    # 2. Edges of the same (i, j) form a group: the common users of i and j, if they are more than one.
    item_count = len(graph.rejections)
    key = pairs(local, item, item_count)
    order = np.argsort(key, kind="stable")
    group_starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    support = np.diff(group_starts, append=len(key))
    useful = support > 1
    order = order[ranges(group_starts[useful], support[useful])]
    group_starts, support = group_starts[useful], support[useful]
    place, local, item, weight = place[order], local[order], item[order], weight[order]
    group = np.repeat(np.arange(len(support)), support)

    # 3. Two passes over the pairs of edges within a group: count the items that two users share, then add up.
    table_starts = np.concatenate(([0], np.cumsum(users.lengths**2)))
    row_starts = table_starts[local] + place * users.lengths[local]
    later = np.repeat(np.cumsum(support), support) - np.arange(len(group)) - 1
    shared = np.ones(table_starts[-1], np.float32)  # item i itself, which is not among the other items
    for left, right in _pairs(later):
        shared += np.bincount(row_starts[left] + place[right], minlength=len(shared)).astype(np.float32)
    total = np.zeros(len(support))
    for left, right in _pairs(later):
        overlap = shared[row_starts[left] + place[right]]
        terms = weight[left] * weight[right] / (settings.alpha2 + overlap)
        total += np.bincount(group[left], terms, minlength=len(total))

    # 4. Gate, popularity, the best of each item.
    firsts = np.cumsum(support) - support
    row, neighbour = local[firsts], item[firsts].astype(np.int64)
    score = 2 * total / np.sqrt(graph.rejections[neighbour])
    row, neighbour, score, support = (part[support > settings.min_support] for part in (row, neighbour, score, support))
    best = np.lexsort((neighbour, -score, row))
    row_counts = np.bincount(row, minlength=len(block))
    best = best[places(row_counts) < settings.neighbours]
    return block[row[best]], neighbour[best], score[best], support[best]


def _pairs(later: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every edge with each of the `later` (N,) edges behind it in its group, in chunks of bounded size."""
    for first, last in blocks(later, _BLOCK_PAIRS):
        edges = np.arange(first, last)
        counts = later[first:last]
        yield np.repeat(edges, counts), ranges(edges + 1, counts)
