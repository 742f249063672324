"""What more than one stage reads: the interactions, and the catalogue that the first stage left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.evaluation.metrics import ranked_items as ranked_items
from conrec.evaluation.metrics import scored_items as scored_items
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import REJECTED, Events, encode_events
from conrec.feedback.labels import DROPPED, read_interactions
from conrec.progress import console
from conrec.ragged import Ragged, ranges

SHARE_PRIOR = 0.3
"""Rejections added to every item before an ID's are shared among its items."""


def blocklists_url(config: Config) -> str:
    """Folder that readers open."""
    return storage.join(config.root, "blocklists")


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


def read_events(
    config: Config, item_ids: pa.Array, until_us: int | None = None, max_unknown_share: float | None = None
) -> Events:
    """The interactions until a moment as arrays; says how many lay ahead of now, or named items that are unknown.

    `max_unknown_share`: in place of the settings' own, where what is not known yet is left out.
    """
    if max_unknown_share is None:
        max_unknown_share = config.interactions.max_unknown_item_share
    interactions = read_interactions(config.interactions)
    dropped = int(interactions.schema.metadata[DROPPED])
    if until_us is not None:
        interactions = interactions.filter(pc.less_equal(interactions["timestamp"].cast(pa.int64()), until_us))
    if dropped:
        console.print(
            f"  {dropped:,} interactions lie ahead of now (interactions.max_clock_skew_hours) and are left out"
        )
    events, unknown = encode_events(interactions, item_ids, max_unknown_share)
    if unknown:
        console.print(f"  {unknown:,} of {interactions.num_rows:,} interactions name items that the catalogue lacks")
    return events


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
    pairs = np.unique(events.rows[rejected].astype(np.int64) * item_count + events.items[rejected])
    return np.bincount(pairs % item_count, minlength=item_count)


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
