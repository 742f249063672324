"""The prefix tree of the catalogue's semantic IDs, as CSR arrays.

Decoding may only continue a prefix with codes that continue it in the catalogue. Allowed sets by position, or by the
last code alone, would admit IDs that do not exist; so every node stands for a whole prefix and has its own children.

    trie = Trie.build(semantic_ids, codes=256)
    trie.find(np.array([[12, 7, 200]]))      # leaf, or -1 when no item has this ID

Invariants: the child through edge e of level l is node e of level l + 1, so an edge needs no target; the children of
a node ascend; leaf m is row m of the sorted distinct IDs; every node has a child, every leaf an item.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from conrec.errors import DataError
from conrec.ragged import Ragged


@dataclass(frozen=True)
class Trie:
    """All full prefixes of the catalogue's semantic IDs.

    Shape: semantic_ids (M, L) int32, distinct and in lexicographic order; child_offsets[l] (nodes of level l + 1,)
    int64, where level 0 holds the root alone; child_codes[l] (nodes of level l + 1,) int32; item_leaves (I,) int32, the
    leaf of each item row, -1 for a row that is not live and whose ID no live one has; leaf_items, the live item rows of
    each leaf, ascending.
    """

    levels: int
    codes: int
    semantic_ids: np.ndarray
    child_offsets: tuple[np.ndarray, ...]
    child_codes: tuple[np.ndarray, ...]
    item_leaves: np.ndarray
    leaf_items: Ragged

    @classmethod
    def build(cls, semantic_ids: np.ndarray, codes: int) -> Trie:
        """The trie of items with these IDs, in any order, repeats allowed.

        Shape: semantic_ids (I, L) integers in [0, codes), I and L at least 1.
        Raises `DataError` for an empty catalogue (its allowed sets would be empty) or a code out of range.
        """
        semantic_ids = np.asarray(semantic_ids)
        if semantic_ids.ndim != 2 or 0 in semantic_ids.shape:
            raise DataError(
                f"semantic IDs have shape {semantic_ids.shape}: a trie needs (items, levels), one or more of each; "
                "encode the items of the catalogue first"
            )
        outside = (semantic_ids < 0) | (semantic_ids >= codes)
        if outside.any():
            row, level = np.argwhere(outside)[0]
            raise DataError(
                f"item row {row}, level {level}: code {semantic_ids[row, level]} is outside [0, {codes}); "
                "give the codebook's number of codes per level"
            )
        item_count, levels = semantic_ids.shape

        # 1. Sort; np.lexsort takes its most significant key last and keeps the order of equal rows.
        order = np.lexsort(semantic_ids.T[::-1])
        ordered = semantic_ids[order].astype(np.int32)

        # 2. A row opens a new prefix of length l + 1 where any of its first l + 1 codes differs from the row before.
        opens = np.ones((item_count, levels), bool)
        opens[1:] = np.logical_or.accumulate(ordered[1:] != ordered[:-1], axis=1)
        distinct = opens[:, -1]
        leaf_of_ordered = np.cumsum(distinct) - 1

        # 3. Edges of level l: its opening rows. Their parent is the node of level l that the row lies under.
        child_offsets, child_codes = [], []
        parent_of_row = np.zeros(item_count, np.int64)
        node_count = 1
        for level in range(levels):
            edges = opens[:, level]
            children = np.bincount(parent_of_row[edges], minlength=node_count)
            child_offsets.append(np.concatenate(([0], np.cumsum(children, dtype=np.int64))))
            child_codes.append(ordered[edges, level])
            parent_of_row = np.cumsum(edges) - 1
            node_count = int(edges.sum())

        item_leaves = np.empty(item_count, np.int32)
        item_leaves[order] = leaf_of_ordered
        return cls(
            levels=levels,
            codes=codes,
            semantic_ids=ordered[distinct],
            child_offsets=tuple(child_offsets),
            child_codes=tuple(child_codes),
            item_leaves=item_leaves,
            leaf_items=Ragged.from_rows(leaf_of_ordered, order, node_count),
        )

    @classmethod
    def of_live(cls, semantic_ids: np.ndarray, codes: int, live: np.ndarray) -> Trie:
        """The trie of the live items, with the rows of all: what disappeared has a history, and no leaf to itself.

        Shape: semantic_ids (I, L), live (I,) bool. Raises `DataError` where nothing is live.
        """
        rows = np.flatnonzero(live)
        trie = cls.build(semantic_ids[rows], codes)
        items = Ragged(rows[trie.leaf_items.values], trie.leaf_items.offsets)
        return replace(trie, item_leaves=trie.find(semantic_ids).astype(np.int32), leaf_items=items)

    def __len__(self) -> int:
        return len(self.semantic_ids)

    def find(self, semantic_ids: np.ndarray) -> np.ndarray:
        """The leaf of each semantic ID, -1 where the catalogue has no such ID.

        Shape: semantic_ids (N, L) integers, any values; returns (N,) int64.
        """
        semantic_ids = np.asarray(semantic_ids, np.int64)
        known = ((semantic_ids >= 0) & (semantic_ids < self.codes)).all(axis=1)
        nodes = np.zeros(len(semantic_ids), np.int64)
        for level in range(self.levels):
            offsets, codes = self.child_offsets[level], self.child_codes[level]
            # Parent and code as one number ascend over the edges, so one binary search finds parent and child.
            parents = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
            edge_keys = parents * self.codes + codes
            keys = nodes * self.codes + semantic_ids[:, level]
            nodes = np.minimum(np.searchsorted(edge_keys, keys), len(edge_keys) - 1)
            known &= edge_keys[nodes] == keys
        return np.where(known, nodes, -1)
