"""Is what a night is fed like what the last one was? Figures of the log, and where two of them lie too far apart.

    now = Feed.of(log, items, watermark_us, None if before is None else before.until_us)
    for line in findings(before, now, config.nightly): ...

Half a day that never arrived, a day that arrived twice, labels that a new client no longer sends, ids that were made
anew: each still reads as a log, and gives lists that are wrong. Invariant: memory is that of a bucket and of the items.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conrec.config import DAY_US, NightlySettings
from conrec.feedback.events import Events
from conrec.tables import KINDS

LEAST = 1000
"""Fewer events, users or items than this say nothing by a share or a factor."""
_OF_DAY = ("events", *KINDS, "repeated", "users", "new_users", "items", "new_items")
_SHARES = {f"{kind} events": (kind, "events") for kind in KINDS}
_RISING = {
    "events that repeat another": ("repeated", "events"),
    "users who are new": ("new_users", "users"),
    "items that are new": ("new_items", "items"),
}
"""A young log has many of these, and fewer every day: only a rise says something."""


@dataclass(frozen=True)
class Feed:
    """A log as a night found it, of which `day` tells the last 24 hours."""

    until_us: int
    """Time of the last event, the moment of the night."""
    events: int
    """All until then."""
    until_earlier: int
    """Those until the moment of the night before; all of them where there is none."""
    day: Mapping[str, int]
    """events, those of each kind, `repeated` (the same user, item, time and kind as another), users and items, and how
    many of these no earlier event names: `new_users`, `new_items`."""

    @classmethod
    def of(cls, log: Iterable[Events], item_count: int, until_us: int, earlier_us: int | None) -> Feed:
        """Counts a log bucket by bucket, no user in two of them."""
        day = dict.fromkeys(_OF_DAY, 0)
        all_events = until_earlier = 0
        before, today = np.zeros(item_count, bool), np.zeros(item_count, bool)
        for events in log:
            known = events.times <= until_us
            of_day = known & (events.times > until_us - DAY_US)
            rows = events.rows
            all_events += int(known.sum())
            until_earlier += int(
                (events.times <= (until_us if earlier_us is None else min(earlier_us, until_us))).sum()
            )
            day["events"] += int(of_day.sum())
            for kind, count in zip(KINDS, np.bincount(events.kinds[of_day], minlength=len(KINDS)), strict=True):
                day[kind] += int(count)
            # Events lie by user, time, item and kind: what repeats one stands behind it.
            again = np.ones(max(0, len(events) - 1), bool)
            for column in (rows, events.times, events.items, events.kinds):
                again &= column[1:] == column[:-1]
            day["repeated"] += int((again & of_day[1:]).sum())
            active, earlier = (
                np.bincount(rows[part], minlength=len(events.users)) > 0 for part in (of_day, known & ~of_day)
            )
            day["users"] += int(active.sum())
            day["new_users"] += int((active & ~earlier).sum())
            before[events.items[known & ~of_day]] = True
            today[events.items[of_day]] = True
        day["items"], day["new_items"] = int(today.sum()), int((today & ~before).sum())
        return cls(until_us, all_events, until_earlier, day)

    @classmethod
    def read(cls, document: Any) -> Feed | None:
        """What `to_json` wrote; None for what another release wrote, or nothing."""
        try:
            return cls(**{**document, "day": {name: int(document["day"][name]) for name in _OF_DAY}})
        except (TypeError, KeyError, ValueError):
            return None

    def to_json(self) -> dict[str, Any]:
        """As a document."""
        return asdict(self)


def findings(before: Feed, now: Feed, limits: NightlySettings) -> Iterator[str]:
    """Each thing in which the log lies further from that of the night before than the limits allow."""
    then, today = before.day["events"], now.day["events"]
    if max(then, today) >= LEAST and max(then, today) > limits.max_day_factor * min(then, today):
        yield f"events of a day: {today:,}, and {then:,} then; nightly.max_day_factor is {limits.max_day_factor:g}"
    for what, (part, whole) in (_SHARES | _RISING).items():
        if min(before.day[whole], now.day[whole]) < LEAST:
            continue
        was, is_now = (feed.day[part] / feed.day[whole] for feed in (before, now))
        if (is_now - was if what in _RISING else abs(is_now - was)) > limits.max_share_shift:
            yield (
                f"{what}, of all of a day: {is_now:.1%}, and {was:.1%} then; "
                f"nightly.max_share_shift is {limits.max_share_shift:g}"
            )
    if before.events >= LEAST:
        moved = now.until_earlier - before.events
        if abs(moved) > limits.max_past_change * before.events:
            what = "came late" if moved > 0 else "are gone"
            yield (
                f"events until then: {abs(moved):,} of {before.events:,} {what}; "
                f"nightly.max_past_change is {limits.max_past_change:g}"
            )
