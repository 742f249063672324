"""What more than one stage asks for: the interactions as arrays, and where blocklists lie."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.config import Config
from conrec.feedback.events import Events, encode_events
from conrec.feedback.labels import DROPPED, read_interactions
from conrec.progress import console


def blocklists_url(config: Config) -> str:
    """Folder that readers open."""
    return storage.join(config.root, "blocklists")


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
