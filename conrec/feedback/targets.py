"""What a model is to foretell of each anchor: what is rejected and liked in its window, and what is like it.

    foretold = targets(events, anchors)
    items, weights = ground_truth_sets(foretold, swing_neighbours(...), kappa=0.5)

Invariant: an item that the user likes in the window is never in the set as a neighbour of one that is rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.swing import Neighbours
from conrec.ragged import Ragged, blocks, distinct, pairs

_BLOCK = 1 << 22
_MOST_OF_NEIGHBOURS = float(np.nextafter(np.float32(1), np.float32(0)))
"""What is observed weighs 1, and is told from neighbours by that: at kappa = 1 these weigh so much."""


@dataclass(frozen=True)
class Targets:
    """What happens in the window of each anchor.

    Shape: next_negative (A,) int32 item row, -1 if nothing is rejected in the window; future_negatives and
    future_positives: A rows of distinct item rows, ascending.
    """

    next_negative: np.ndarray
    future_negatives: Ragged
    future_positives: Ragged

    def only(self, measured: np.ndarray) -> Targets:
        """These targets where `measured` (A,) bool holds, nothing elsewhere."""
        negatives, positives = (
            Ragged.from_lengths(items.values[measured[items.rows]], items.lengths * measured)
            for items in (self.future_negatives, self.future_positives)
        )
        return Targets(np.where(measured, self.next_negative, -1).astype(np.int32), negatives, positives)


def targets(events: Events, anchors: Anchors) -> Targets:
    """What is rejected and liked in the window of each anchor."""
    negatives = _of_kind(events, REJECTED)
    first, last = negatives.offsets[anchors.ends], negatives.offsets[anchors.window_ends]
    next_negative = np.full(len(anchors), -1, np.int32)
    next_negative[first < last] = negatives.values[first[first < last]]
    positives = _of_kind(events, LIKED)
    return Targets(
        next_negative,
        distinct(negatives, anchors.ends, anchors.window_ends),
        distinct(positives, anchors.ends, anchors.window_ends),
    )


def ground_truth_sets(targets: Targets, neighbours: Neighbours, kappa: float) -> tuple[Ragged, np.ndarray]:
    """Future negatives with weight 1 and their Swing neighbours with weight kappa, distinct per anchor. No neighbour
    weighs 1: at kappa = 1 the largest number below.

    Items that the anchor's user likes in the window never enter as neighbours.
    Shape: Ragged of A rows of item rows, ascending; weights (values,) float32.
    """
    observed, liked = targets.future_negatives, targets.future_positives
    width = len(neighbours.items)
    degrees = np.concatenate(([0], np.cumsum(neighbours.items.lengths[observed.values])))
    counts, items, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first, last in blocks(observed.lengths + liked.lengths + np.diff(degrees[observed.offsets]), _BLOCK):
        block = np.arange(first, last)
        sources = [observed.take(block), liked.take(block)]
        near = neighbours.items.take(sources[0].values)
        # The source is the key's last digit: of equal pairs the first one stands, observed before liked before
        # neighbour.
        keys = [pairs(part.rows, part.values, width) for part in sources]
        keys.append(pairs(np.repeat(sources[0].rows, near.lengths), near.values, width))
        of_source = np.concatenate([pairs(key, place, 3) for place, key in enumerate(keys)])
        key, source = np.divmod(np.sort(of_source), 3)
        kept = np.diff(key, prepend=-1) != 0
        kept &= source != 1
        rows, values = np.divmod(key[kept], width)
        counts.append(np.bincount(rows, minlength=last - first))
        items.append(values.astype(np.int32))
        weights.append(np.where(source[kept] == 0, 1.0, min(kappa, _MOST_OF_NEIGHBOURS)).astype(np.float32))
    return Ragged.from_lengths(np.concatenate(items), np.concatenate(counts)), np.concatenate(weights)


def _of_kind(events: Events, kind: int) -> Ragged:
    """Items of the events of one kind; offsets (N + 1,) tell how many lie before each event."""
    mask = events.kinds == kind
    return Ragged(events.items[mask], np.concatenate(([0], np.cumsum(mask, dtype=np.int64))))
