"""What became of items that a user had not met: shown in the window of an anchor, and rejected, liked or neither.

    outcomes = first_meetings(events, anchors)
    rejected = outcomes.kinds == REJECTED

Invariant: an item of the history, whatever was said of it, has no outcome: it is known, not predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.ragged import pairs, ranges


@dataclass(frozen=True)
class Outcomes:
    """Pairs of an anchor and an item that its user first met in the window, by anchor, then item.

    Shape: all (N,). anchors int64 positions of the anchors; items int32; kinds int8: LIKED where it was ever liked,
    else REJECTED where it was ever rejected, else SHOWN.
    """

    anchors: np.ndarray
    items: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    def take(self, which: np.ndarray) -> Outcomes:
        """The pairs that a mask or positions name."""
        return Outcomes(self.anchors[which], self.items[which], self.kinds[which])


def first_meetings(events: Events, anchors: Anchors) -> Outcomes:
    """The outcomes of each anchor's window. Shape: A anchors -> N pairs."""
    width = int(events.items.max(initial=0)) + 1

    def meetings(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = ranges(first, last - first)
        rows = np.repeat(np.arange(len(anchors)), last - first)
        return pairs(rows, events.items[places], width), events.kinds[places]

    known = np.unique(meetings(anchors.starts, anchors.ends)[0])
    met, kinds_met = meetings(anchors.ends, anchors.window_ends)
    distinct = np.unique(met)
    kinds = np.full(len(distinct), SHOWN, np.int8)
    for kind in (REJECTED, LIKED):
        kinds[np.isin(distinct, met[kinds_met == kind])] = kind
    new = ~np.isin(distinct, known, assume_unique=True)
    return Outcomes(distinct[new] // width, (distinct[new] % width).astype(np.int32), kinds[new])
