"""Events as arrays: what users did, sorted by user and time once.

A history and a window are then two ranges of one array, and nothing is copied per anchor.

    events, unknown = encode_events(read_interactions(...), items["item_id"], max_unknown_share=0.01)
    rejected = events.where(events.kinds == REJECTED)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.errors import DataError
from conrec.tables import KINDS

REJECTED, LIKED, SHOWN = range(len(KINDS))
"""Codes of the kinds: their positions in `tables.KINDS`."""
_HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Events:
    """Everything users did, sorted by user, time, item and kind: the order of the input's rows and files is nothing.

    Shape: users (U,) string, ascending; offsets (U + 1,) int64; items (N,) int32 item rows; times (N,) int64
    microseconds since 1970; kinds (N,) int8: 0 rejected, 1 liked, 2 shown.
    """

    users: pa.Array
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    @property
    def rows(self) -> np.ndarray:
        """User row of each event, shape (N,) int64."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    def where(self, mask: np.ndarray) -> Events:
        """The events that the mask (N,) names; all users stay, some perhaps without events."""
        kept = np.concatenate(([0], np.cumsum(mask, dtype=np.int64)))
        return Events(self.users, kept[self.offsets], self.items[mask], self.times[mask], self.kinds[mask])

    def before(self, time_us: int) -> Events:
        """The events with time <= time_us."""
        return self.where(self.times <= time_us)


def encode_events(interactions: pa.Table, item_ids: pa.Array, max_unknown_share: float) -> tuple[Events, int]:
    """Interactions as arrays, and how many were dropped because the catalogue lacks their item.

    `item_ids` (I,) are the catalogue's, their positions the item rows. Raises `DataError` when a larger share
    than `max_unknown_share` names unknown items, or all rows do.
    """
    items = pc.index_in(interactions["item_id"], value_set=_as_array(item_ids))
    unknown = items.null_count
    if unknown > max_unknown_share * len(interactions) or unknown == len(interactions):
        source = (interactions.schema.metadata or {}).get(b"source", b"interactions").decode()
        example = interactions["item_id"][pc.index(pc.is_null(items), True).as_py()].as_py()
        raise DataError(
            f"{source}: column item_id: {unknown} of {len(interactions)} rows ({unknown / len(interactions):.2%}) name "
            f"items that the catalogue lacks, for example {example!r}; the limit is {max_unknown_share:.2%}. Add these "
            "items to the items table, or raise interactions.max_unknown_item_share"
        )
    if unknown:
        known = pc.is_valid(items)
        interactions, items = interactions.filter(known), items.drop_null()
    # Encoded before the chunks are joined: the codes of a large table fit one array, its strings may not.
    encoded = interactions["user_id"].dictionary_encode().unify_dictionaries().combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    rows = rank[encoded.indices.to_numpy(zero_copy_only=False)]
    times = interactions["timestamp"].cast(pa.int64()).to_numpy()
    kinds = pc.index_in(interactions["feedback"], value_set=pa.array(KINDS)).to_numpy().astype(np.int8)
    item_rows = items.to_numpy().astype(np.int32)
    by_user = _canonical_order(rows, times, item_rows, kinds)
    offsets = np.concatenate(([0], np.cumsum(np.bincount(rows, minlength=len(order)), dtype=np.int64)))
    users = encoded.dictionary.take(pa.array(order))
    return Events(users, offsets, item_rows[by_user], times[by_user], kinds[by_user]), unknown


def _canonical_order(rows: np.ndarray, times: np.ndarray, items: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Positions sorted by user row, time, item and kind. Shape: (N,) each -> (N,)."""
    order = np.lexsort((times, rows))
    tied = (np.diff(rows[order]) == 0) & (np.diff(times[order]) == 0)
    among = np.flatnonzero(np.concatenate((tied, [False])) | np.concatenate(([False], tied)))
    # Few events share a moment: only they are sorted by all four.
    moments = order[among]
    order[among] = moments[np.lexsort((kinds[moments], items[moments], times[moments], rows[moments]))]
    return order


def log_end(events: Events) -> int:
    """The end of the last event's hour, in microseconds since 1970."""
    return hour_end(int(events.times.max(initial=0)))


def hour_end(time_us: int) -> int:
    """The first full hour at or after a time, in microseconds since 1970."""
    return -(-time_us // _HOUR_US) * _HOUR_US


def _as_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
