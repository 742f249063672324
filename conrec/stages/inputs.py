"""What more than one stage asks for: the interactions as arrays, and where blocklists lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.config import Config
from conrec.feedback.clock import Clock
from conrec.feedback.events import Coder, Events, arranged
from conrec.feedback.labels import interaction_tables, no_rows
from conrec.feedback.log import Log, divided
from conrec.progress import console

T = TypeVar("T")


def blocklists_url(config: Config) -> str:
    """Folder that readers open."""
    return storage.join(config.root, "blocklists")


def read_events(
    config: Config, item_ids: pa.Array, until_us: int | None = None, max_unknown_share: float | None = None
) -> Events:
    """The interactions until a moment as arrays in memory; says how many lay ahead of now, or named unknown items.

    `max_unknown_share`: in place of the settings' own, where what is not known yet is left out.
    """
    return _read(config, item_ids, until_us, max_unknown_share, arranged)


def read_log(config: Config, item_ids: pa.Array, buckets: int, until_us: int | None = None) -> Log:
    """The same in so many buckets of users, one of which is in memory at a time."""
    return _read(config, item_ids, until_us, None, lambda tables: divided(tables, buckets))


def _read(
    config: Config,
    item_ids: pa.Array,
    until_us: int | None,
    max_unknown_share: float | None,
    take: Callable[[Iterator[pa.Table]], T],
) -> T:
    settings = config.interactions
    if max_unknown_share is None:
        max_unknown_share = settings.max_unknown_item_share
    clock, coder = Clock(settings), Coder(item_ids, max_unknown_share, settings.path)

    def coded() -> Iterator[pa.Table]:
        for table in interaction_tables(settings, clock=clock):
            if until_us is not None:
                table = table.filter(pc.less_equal(table["timestamp"].cast(pa.int64()), until_us))
            yield coder.code(table)

    taken = take(coded())
    if clock.events == clock.dropped:
        raise no_rows(settings.path)
    coder.check()
    if clock.dropped:
        console.print(
            f"  {clock.dropped:,} interactions lie ahead of now (interactions.max_clock_skew_hours) and are left out"
        )
    if coder.unknown:
        console.print(f"  {coder.unknown:,} of {coder.rows:,} interactions name items that the catalogue lacks")
    return taken
