"""From semantic IDs to items, for systems that generate IDs: several items may share one.

    leaf_items = leaf_items_by_rejections(trie, past)
    ranked = ranked_items(leaves, leaf_items, excluded, k=20)

Invariant: which of them comes first is decided by events until the cut alone.
"""

from __future__ import annotations

import numpy as np

from conrec.catalogue.trie import Trie
from conrec.evaluation.metrics import exclude, exclude_scored
from conrec.feedback.events import Events
from conrec.feedback.histories import rejecting_users
from conrec.ragged import Ragged, pairs, ranges


def ranked_items(leaves: np.ndarray, leaf_items: Ragged, excluded: Ragged, k: int) -> np.ndarray:
    """The first k items of generated IDs that are not excluded, in the order of the IDs.

    Shape: leaves (A, W), -1 for none; leaf_items: item rows of each leaf in the order they are to be taken;
    returns (A, k) int32 item rows, -1 where there are fewer.
    """
    items, lengths = _items_of(leaves, leaf_items)
    return exclude(Ragged.from_lengths(items, lengths.sum(axis=1)).padded(-1), excluded, k)


def scored_items(
    leaves: np.ndarray, scores: np.ndarray, leaf_items: Ragged, shares: np.ndarray, excluded: Ragged, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k items by score of the ID plus log share of the item in it: (A, k) int32 and float32, -inf padding.

    Shape: leaves and scores (A, W), shares (I,), the rest as in `ranked_items`.
    """
    items, lengths = _items_of(leaves, leaf_items)
    per_row = lengths.sum(axis=1)
    values = (np.repeat(scores.ravel(), lengths.ravel()) + shares[items]).astype(np.float32)
    padded, dense = Ragged.from_lengths(items, per_row).padded(-1), Ragged.from_lengths(values, per_row).padded(-np.inf)
    order = np.argsort(-dense, axis=1, kind="stable")
    return exclude_scored(
        np.take_along_axis(padded, order, axis=1), np.take_along_axis(dense, order, axis=1), excluded, k
    )


def without_liked(leaves: np.ndarray, liked: Ragged, width: int) -> np.ndarray:
    """Generated leaves (A, W), -1 where the user has liked one. Shape: liked A rows of leaves, of `width` in all."""
    keys = pairs(np.arange(len(leaves))[:, None], leaves, width)
    return np.where(np.isin(keys, pairs(liked.rows, liked.values, width)), -1, leaves)


def _items_of(leaves: np.ndarray, leaf_items: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """The items of generated IDs one behind the other, and how many each ID has. Shape: (N,) and (A, W)."""
    lengths = np.where(leaves >= 0, leaf_items.lengths[leaves], 0)
    return leaf_items.values[ranges(leaf_items.offsets[leaves].ravel(), lengths.ravel())], lengths


SHARE_PRIOR = 0.3
"""Rejections added to every item before an ID's are shared among its items."""


def leaf_items_by_rejections(trie: Trie, events: Events) -> Ragged:
    """Items of each leaf, the most rejected first: a semantic ID shared by several items names that one first."""
    rejections = rejecting_users(events, len(trie.item_leaves))
    items = trie.leaf_items
    order = np.lexsort((-rejections[items.values], items.rows))
    return Ragged(items.values[order], items.offsets)


def item_shares(trie: Trie, events: Events) -> np.ndarray:
    """log of the share that each item has in the rejections of its semantic ID. Shape: (I,) float32."""
    rejections = rejecting_users(events, len(trie.item_leaves)) + SHARE_PRIOR
    return np.log(rejections / np.bincount(trie.item_leaves, rejections)[trie.item_leaves]).astype(np.float32)


def without_padding(leaves: np.ndarray) -> Ragged:
    """Dense generated leaves (A, K), -1 for none, as rows without the padding."""
    real = leaves >= 0
    return Ragged.from_lengths(leaves[real], real.sum(axis=1))
