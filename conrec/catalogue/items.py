"""What the items are: their table, and with semantic IDs the catalogue.

    catalogue = Catalogue.of(items, codebook, live_ids)
    catalogue.trie.item_leaves              # leaf of each row of catalogue.items, -1 for one that has disappeared

Invariant: rows ascend by item_id, and every array of items stands in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.ragged import Ragged


@dataclass(frozen=True)
class Items:
    """What the items are. Shape: items I rows, ascending by id."""

    items: pa.Table

    @property
    def item_ids(self) -> pa.Array:
        """Shape: (I,) string, ascending."""
        return self.items["item_id"].combine_chunks()

    @property
    def categories(self) -> np.ndarray | None:
        """Category number of each item (I,), or None where the items have no categories."""
        if "category" not in self.items.column_names:
            return None
        column = self.items["category"].combine_chunks().fill_null("")
        return np.asarray(column.dictionary_encode().indices).astype(np.int64)


@dataclass(frozen=True)
class Catalogue(Items):
    """Items with their semantic IDs, and the trie of those that are live.

    Shape: semantic_ids (I, L) int32; live (I,) bool: the others have disappeared, and are kept because histories name
    them.
    """

    semantic_ids: np.ndarray
    codebook: Codebook
    trie: Trie
    live: np.ndarray

    @classmethod
    def of(cls, items: pa.Table, codebook: Codebook, live_ids: pa.Array | pa.ChunkedArray | None = None) -> Catalogue:
        """Of items with a column semantic_id; without `live_ids` all are live."""
        items = items.sort_by("item_id")
        semantic_ids = Ragged.from_arrow(items["semantic_id"]).values.reshape(items.num_rows, -1)
        live = np.ones(len(items), bool)
        if live_ids is not None:
            live = np.asarray(pc.is_in(items["item_id"], value_set=live_ids.combine_chunks()))
        return cls(items, semantic_ids, codebook, Trie.of_live(semantic_ids, codebook.codes, live), live)


def semantic_id_column(semantic_ids: np.ndarray) -> pa.ListArray:
    """Semantic IDs (N, L) as the column of a table."""
    return Ragged.from_lengths(semantic_ids.ravel(), np.full(len(semantic_ids), semantic_ids.shape[1])).to_arrow()


def item_words(items: pa.Table) -> list[str]:
    """Of each item its category, or without categories the start of its text."""
    column = items["category"].fill_null("") if "category" in items.column_names else items["text"]
    words: list[str] = pc.utf8_slice_codeunits(column, 0, 60).to_pylist()
    return words


def unit_categories(catalogue: Catalogue) -> np.ndarray:
    """Category numbers, one for all where the catalogue has none."""
    categories = catalogue.categories
    return np.zeros(len(catalogue.semantic_ids), np.int64) if categories is None else categories
