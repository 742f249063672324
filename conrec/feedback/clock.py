"""Events that say they happen later than now: the clock of a device, or a wrong unit. None of them can be true.

Invariant: what `Clock.without_future` lets through is no later than now plus `interactions.max_clock_skew_hours`. So
the watermark of a night, which readers never go back behind, is never that of an event that has not happened.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import InteractionSettings
from conrec.errors import DataError
from conrec.tables import TIMESTAMP, file_row


def latest_us(settings: InteractionSettings, now: datetime | None = None) -> int:
    """The latest time that an event can have, in microseconds since 1970: now and the skew.

    Now is what the caller gives, else `interactions.now`, else the clock of this machine.
    """
    moment = now or settings.now or datetime.now(UTC)
    return round(moment.timestamp() * 1e6 + settings.max_clock_skew_hours * 3_600e6)


class Clock:
    """Drops the events of one input that lie ahead, table by table, and counts them."""

    def __init__(self, settings: InteractionSettings, now: datetime | None = None) -> None:
        self._settings = settings
        self._latest = pa.scalar(latest_us(settings, now), pa.int64()).cast(TIMESTAMP)
        self._first = ""
        self.events = self.dropped = 0

    def without_future(self, table: pa.Table, source: str, rows: np.ndarray | None) -> pa.Table:
        """The events of a checked table that can be true; `rows` as `tables.check` takes it.

        Raises `DataError` for the first other one, where the settings admit none.
        """
        ahead = pc.greater(table["timestamp"], self._latest)
        count = pc.sum(ahead).as_py() or 0
        self.events += len(table)
        self.dropped += count
        if not count:
            return table
        if not self._first:
            self._first = self._example(table, source, rows, pc.index(ahead, True).as_py())
        if not self._settings.max_future_share:
            self.check()
        return table.filter(pc.invert(ahead))

    def check(self) -> None:
        """After the last file. Raises `DataError` where more lie ahead than the settings admit."""
        limit = self._settings.max_future_share
        if self.dropped > limit * self.events:
            raise DataError(
                f"{self._first} ({self.dropped:,} of {self.events:,} events read so far, the limit is "
                f"interactions.max_future_share = {limit:g}). Mend the clock or the unit that wrote them; to leave "
                "such events out, and count them, raise interactions.max_future_share"
            )

    def _example(self, table: pa.Table, source: str, rows: np.ndarray | None, row: int) -> str:
        event = table.slice(row, 1).to_pylist()[0]
        latest = self._latest.as_py().isoformat(timespec="seconds")
        return (
            f"{source}: column timestamp holds {event['timestamp'].isoformat()} in row {file_row(rows, row)}, user "
            f"{event['user_id']!r}, later than {latest}: now (interactions.now, or this machine's clock) plus "
            f"interactions.max_clock_skew_hours = {self._settings.max_clock_skew_hours:g}"
        )
