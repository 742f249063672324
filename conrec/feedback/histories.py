"""What histories hold: the items of each anchor, the rejections in it, and who rejected an item."""

from __future__ import annotations

import numpy as np

from conrec.feedback.anchors import Anchors
from conrec.feedback.events import REJECTED, Events
from conrec.ragged import Ragged, pairs, ranges


def history_items(events: Events, anchors: Anchors) -> Ragged:
    """Item rows of each anchor's history."""
    lengths = anchors.ends - anchors.starts
    return Ragged.from_lengths(events.items[ranges(anchors.starts, lengths)], lengths)


def rejections_in_history(events: Events, anchors: Anchors) -> np.ndarray:
    """Rejections up to each anchor. Shape: (A,) int64."""
    upto = np.concatenate(([0], np.cumsum(events.kinds == REJECTED)))
    return upto[anchors.ends] - upto[anchors.starts]


def rejecting_users(events: Events, item_count: int) -> np.ndarray:
    """How many users rejected each item. Shape: (I,) int64."""
    rejected = events.kinds == REJECTED
    return users_of(events.rows[rejected], events.items[rejected], item_count)


def users_of(users: np.ndarray, items: np.ndarray, item_count: int) -> np.ndarray:
    """How many distinct users each item has. Shape: (N,) each -> (I,) int64."""
    distinct = np.unique(pairs(users, items, item_count))
    return np.bincount(distinct % item_count, minlength=item_count)
