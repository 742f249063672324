"""Whether a night is fed like the one before: asked once the log is read, before anything is made of it.

feed = fed(config, log, item_count)
"""

from __future__ import annotations

from datetime import UTC, datetime

from conrec.config import Config
from conrec.errors import DataError
from conrec.feedback.feed import Feed, findings
from conrec.feedback.log import Log
from conrec.stages.artefacts import intact

FEED = "feed"
"""Where a night's figures say what it was fed."""


def fed(config: Config, log: Log, item_count: int) -> Feed:
    """What tonight's log holds. Raises `DataError` where it lies too far from that of the night before.

    That is the published one of this root whose log ends last, and no later than tonight's: what the audit refused may
    have been made of a log that was wrong.
    """
    nights = (manifest["figures"] for _, manifest in intact(config.root, "nightly"))
    every = (Feed.read(figures.get(FEED)) for figures in nights if "version" in figures)
    earlier = (feed for feed in every if feed is not None and feed.until_us <= log.last_us)
    before = max(earlier, key=lambda feed: feed.until_us, default=None)
    now = Feed.of(log, item_count, log.last_us, None if before is None else before.until_us)
    found = [] if before is None else [f"\n  {line}" for line in findings(before, now, config.nightly)]
    if before is not None and found:
        until = datetime.fromtimestamp(before.until_us / 1e6, UTC)
        raise DataError(
            f"{config.interactions.path}: is not like the log that the night until {until:%Y-%m-%d %H:%M} was fed:"
            f"{''.join(found)}\nlook at what writes the log; serving keeps its lists meanwhile. Where the log is "
            "right, run this night with the limit raised, as in --set nightly.max_day_factor=100"
        )
    return now
