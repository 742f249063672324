"""Events as arrays: what users did, sorted by user and time once.

A history and a window are then two ranges of one array, and nothing is copied per anchor.

    events, unknown = encode_events(read_interactions(...), items["item_id"], max_unknown_share=0.01)
    rejected = events.where(events.kinds == REJECTED)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.buckets import user_buckets
from conrec.errors import DataError
from conrec.ragged import ranges
from conrec.tables import KINDS

REJECTED, LIKED, SHOWN = range(len(KINDS))
"""Codes of the kinds: their positions in `tables.KINDS`."""
_HOUR_US = 3_600_000_000
CODED = pa.schema(
    [
        pa.field("user_id", pa.dictionary(pa.int32(), pa.string())),
        pa.field("item", pa.int32()),
        pa.field("time", pa.int64()),
        pa.field("kind", pa.int8()),
    ]
)
"""Interactions whose items, times and kinds are the numbers of `Events`, in any order."""


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

    def of_bucket(self, bucket: int, buckets: int) -> Events:
        """The users of one of so many buckets, with all that they did."""
        return self.of(np.flatnonzero(user_buckets(self.users, buckets) == bucket))

    def of(self, users: np.ndarray) -> Events:
        """Those users alone, with all that they did. Shape: (V,) rows of the users."""
        lengths = np.diff(self.offsets)[users]
        places = ranges(self.offsets[users], lengths)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        names = self.users.take(pa.array(users, pa.int64()))
        return Events(names, offsets, self.items[places], self.times[places], self.kinds[places])

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
    coder = Coder(item_ids, max_unknown_share)
    coded = coder.code(interactions)
    coder.check()
    return arranged([coded]), coder.unknown


class Coder:
    """Codes interactions table by table, and counts what the catalogue lacks.

    coder = Coder(item_ids, max_unknown_share)
    parts = [coder.code(table) for table in interaction_tables(settings)]
    coder.check()
    """

    def __init__(self, item_ids: pa.Array | pa.ChunkedArray, max_unknown_share: float, source: str = "") -> None:
        self._item_ids, self._limit, self._source = _as_array(item_ids), max_unknown_share, source
        self._example: str | None = None
        self.rows = self.unknown = 0

    def code(self, interactions: pa.Table) -> pa.Table:
        """The rows of known items as CODED: 17 bytes each and every user id once, whatever the input's columns."""
        items = pc.index_in(interactions["item_id"], value_set=self._item_ids)
        unknown = items.null_count
        self.rows, self.unknown = self.rows + len(items), self.unknown + unknown
        if unknown and self._example is None:
            self._example = interactions["item_id"][pc.index(pc.is_null(items), True).as_py()].as_py()
            metadata = interactions.schema.metadata or {}
            self._source = self._source or metadata.get(b"source", b"interactions").decode()
        columns = [
            # Coded chunk by chunk: the codes of a large table fit one array, its strings may not.
            interactions["user_id"].dictionary_encode(),
            items.cast(pa.int32()),
            interactions["timestamp"].cast(pa.int64()),
            pc.index_in(interactions["feedback"], value_set=pa.array(KINDS)).cast(pa.int8()),
        ]
        coded = pa.table(columns, schema=CODED)
        return coded.filter(pc.is_valid(items)) if unknown else coded

    def check(self) -> None:
        """After the last table. Raises `DataError` where too many rows name unknown items, or all do."""
        if self.unknown and (self.unknown > self._limit * self.rows or self.unknown == self.rows):
            raise DataError(
                f"{self._source}: column item_id: {self.unknown} of {self.rows} rows ({self.unknown / self.rows:.2%}) "
                f"name items that the catalogue lacks, for example {self._example!r}; the limit is {self._limit:.2%}. "
                "Add these items to the items table, or raise interactions.max_unknown_item_share"
            )


def arranged(parts: Iterable[pa.Table]) -> Events:
    """Coded tables as events, whatever the order of rows and tables."""
    coded = pa.concat_tables([CODED.empty_table(), *parts])
    encoded = coded["user_id"].unify_dictionaries().combine_chunks()
    items, times, kinds = (coded[name].to_numpy() for name in ("item", "time", "kind"))
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    rows = rank[encoded.indices.to_numpy(zero_copy_only=False)]
    by_user = _canonical_order(rows, times, items, kinds)
    counts = np.bincount(rows, minlength=len(order))
    # The dictionary of a table that was filtered may name users of whom nothing is left.
    there = counts > 0
    offsets = np.concatenate(([0], np.cumsum(counts[there], dtype=np.int64)))
    users = encoded.dictionary.take(pa.array(order[there]))
    return Events(users, offsets, items[by_user], times[by_user], kinds[by_user])


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
