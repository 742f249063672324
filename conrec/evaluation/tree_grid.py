"""Boosted trees over every pair of a user and an item, many times faster than row by row.

    scores = grid_scores(trees, {"leaning": (B,)}, {"shown": (I,)}, {"user x category": ((B, K), (I,))})

A column is known by the user, by the item, or by the user and a key of the item. So each split is decided once a user,
once an item or once a user and key, as a mask of the leaves that it leaves open (after QuickScorer, Lucchese et al.,
SIGIR 2015). What is left for a pair is one AND a column and one look at a table a tree, instead of a walk.

Invariant: equal to `Trees.scores` of the same pairs, bit for bit: the same comparisons, and the trees summed in their
order as float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from conrec.evaluation.trees import Trees

_MASKS = ((8, np.uint8), (16, np.uint16), (32, np.uint32))
"""Most leaves -> the type of their masks."""
_TABLE_LEAVES = 16
"""Up to so many, a table over all masks holds the values; beyond, the place of the one bit finds it."""

_PAIRS_AT_ONCE = 1 << 15
"""So few that a block stays in the cache of a core."""


@dataclass(frozen=True)
class _Tree:
    """Shape: splits by column: (S,) thresholds, and (S,) masks of the leaves open where value <= threshold, and where
    not; values (leaves,) float64."""

    splits: Mapping[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
    values: np.ndarray

    @property
    def kind(self) -> type[np.unsignedinteger[Any]]:
        """Of its masks."""
        return _mask_type(len(self.values))

    def mask(self, column: int, values: np.ndarray) -> np.ndarray:
        """The leaves that the splits on one column leave open. Shape: values (...) -> (...) masks."""
        found = np.full(values.shape, self.kind((1 << len(self.values)) - 1))
        for threshold, below, above in zip(*self.splits[column], strict=True):
            found &= np.where(values <= threshold, below, above)
        return found

    def of(self, masks: np.ndarray) -> np.ndarray:
        """The value of the one leaf that each mask leaves open. Shape: (...) -> (...) float64."""
        if len(self.values) > _TABLE_LEAVES:
            # The exponent of a power of two is the place of its bit.
            return self.values[(masks.astype(np.float32).view(np.int32) >> 23) - 127]
        return self._table.take(masks)

    @cached_property
    def _table(self) -> np.ndarray:
        table = np.zeros(1 << len(self.values))
        table[1 << np.arange(len(self.values))] = self.values
        return table


def grid_scores(
    trees: Trees,
    of_users: Mapping[str, np.ndarray],
    of_items: Mapping[str, np.ndarray],
    crossed: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Log-odds of a rejection of every pair, by the columns that the trees were fitted on.

    Shape: of_users (B,) each, of_items (I,) each, crossed (B, K) values and (I,) keys each; returns (B, I) float32.
    No value may be NaN.
    """
    users, items = len(next(iter(of_users.values()))), len(next(iter(of_items.values())))
    total = np.zeros((users, items))
    step = max(1, _PAIRS_AT_ONCE // max(items, 1))
    for tree in _parsed(trees.booster):
        every = tree.kind((1 << len(tree.values)) - 1)
        by_item, by_user, by_key = np.full(items, every), np.full(users, every), []
        for column in tree.splits:
            name = trees.names[column]
            if name in of_users:
                by_user &= tree.mask(column, of_users[name])
            elif name in of_items:
                by_item &= tree.mask(column, of_items[name])
            else:
                by_key.append((tree.mask(column, crossed[name][0]), crossed[name][1]))
        for start in range(0, users, step):
            block = slice(start, start + step)
            masks = by_user[block, None] & by_item
            for known, keys in by_key:
                masks &= known[block].take(keys, axis=1)
            total[block] += tree.of(masks)
    return total.astype(np.float32)


@lru_cache(maxsize=8)
def _parsed(booster: Any) -> tuple[_Tree, ...]:
    return tuple(_tree(tree["tree_structure"]) for tree in booster.dump_model()["tree_info"])


def _tree(root: Mapping[str, Any]) -> _Tree:
    values: list[float] = []
    splits: dict[int, list[tuple[float, int, int]]] = {}

    def leaves(node: Mapping[str, Any]) -> int:
        """Numbers the leaves below a node from left to right; their mask."""
        if "leaf_value" in node:
            values.append(node["leaf_value"])
            return 1 << len(values) - 1
        left, right = leaves(node["left_child"]), leaves(node["right_child"])
        splits.setdefault(node["split_feature"], []).append((node["threshold"], right, left))
        return left | right

    leaves(root)
    every, kind = (1 << len(values)) - 1, _mask_type(len(values))
    return _Tree(
        {
            column: (
                np.array([threshold for threshold, _, _ in found]),
                np.array([every ^ right for _, right, _ in found], kind),
                np.array([every ^ left for _, _, left in found], kind),
            )
            for column, found in splits.items()
        },
        np.array(values),
    )


def _mask_type(leaves: int) -> type[np.unsignedinteger[Any]]:
    for most, kind in _MASKS:
        if leaves <= most:
            return kind
    raise ValueError(f"a tree of {leaves} leaves; masks hold {_MASKS[-1][0]}: fit smaller trees")
