"""Anchors: users at a time, each with the range of its history and of its future window in the events.

The history of an anchor at time t is the user's events with time <= t, its future window the events in
(t, t + horizon]. Invariant: nothing after the training cut is in a training anchor's window, and an evaluation window
is whole.

    anchors = training_anchors(events.before(timeline.cut_us), timeline)
    histories = ranges(anchors.starts, anchors.ends - anchors.starts)       # positions in the events
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec.config import TimelineSettings
from conrec.feedback.events import LIKED, REJECTED, Events, hour_end
from conrec.hashing import stable_hash
from conrec.ragged import Ragged, distinct, places

MOST_VALIDATION_USERS = 100_000
"""Users whose validation anchors decide, about so many at most, by the hash that makes a user one."""


@dataclass(frozen=True)
class Anchors:
    """Users at a time, with the ranges of their history and future window in the events.

    Shape: users (A,) int32 rows of `Events.users`; times (A,) int64; history = events[starts:ends] (time <= t),
    window = events[ends:window_ends] (t < time <= end of the window), all (A,) int64.
    """

    users: np.ndarray
    times: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """All five, in order."""
        return self.users, self.times, self.starts, self.ends, self.window_ends

    def take(self, rows: np.ndarray) -> Anchors:
        """The anchors at the given positions, or where a mask is true."""
        return Anchors(self.users[rows], self.times[rows], self.starts[rows], self.ends[rows], self.window_ends[rows])


def validation_users(users: pa.Array, share: float) -> np.ndarray:
    """Which users (U,) are validation users, by a stable hash of their id, so that a user never changes sides."""
    return stable_hash(users) <= np.uint64(round(share * 2**63) * 2 - 1)


def training_anchors(events: Events, timeline: TimelineSettings, users_mask: np.ndarray | None = None) -> Anchors:
    """Anchors just before rejections, at most `max_anchors_per_user`, spread evenly over a user's rejections.

    t is the time of the user's last event before the rejection, so every anchor has a history and a next
    negative. Windows end at the cut at the latest; rejections more than a horizon after that event, after the
    cut, or of users outside `users_mask` (U,) set no anchor. Deterministic.
    """
    rows = events.rows
    new_moment = np.concatenate(([True], (np.diff(events.times) != 0) | (np.diff(rows) != 0)))[: len(events)]
    moments = np.maximum.accumulate(np.where(new_moment, np.arange(len(events)), 0))
    rejected = (events.kinds == REJECTED) & (events.times <= timeline.cut_us)
    if users_mask is not None:
        rejected &= users_mask[rows]
    # Two rejections of one moment have the same history: one anchor.
    ends = np.unique(moments[rejected])
    users = rows[ends]
    ends = ends[ends > events.offsets[users]]
    ends = ends[events.times[ends] - events.times[ends - 1] <= timeline.horizon_us]
    per_user = np.bincount(rows[ends], minlength=len(events.users))
    chosen = np.minimum(per_user, timeline.max_anchors_per_user)
    nth = places(chosen)
    # The middles of `chosen` equal stretches of the user's rejections.
    middle = (2 * nth + 1) * np.repeat(per_user, chosen) // np.repeat(np.maximum(2 * chosen, 1), chosen)
    ends = ends[np.repeat(np.cumsum(per_user) - per_user, chosen) + middle]
    users, times = rows[ends].astype(np.int32), events.times[ends - 1]
    return _anchors(events, users, times, np.minimum(times + timeline.horizon_us, timeline.cut_us))


def evaluation_anchors(events: Events, timeline: TimelineSettings, end_us: int | None = None) -> Anchors:
    """Anchors at the cut and every horizon after it, while the window is whole: until `end_us`, as `evaluated_until`
    gives it for the whole log, or by the events that are here.

    An anchor needs `min_history` distinct items in its history, a rejected and a liked one among them, and a
    rejection in its window. A window is whole when it ends with the last event's hour or before: logs are cut by full
    hours or days, so their last event lies a little before their end.
    """
    times = evaluation_times(events, timeline, end_us)
    users = np.tile(np.arange(len(events.users), dtype=np.int32), len(times))
    times = np.repeat(times, len(events.users))
    return _measurable(events, _anchors(events, users, times, times + timeline.horizon_us), timeline)


def evaluation_times(events: Events, timeline: TimelineSettings, end_us: int | None = None) -> np.ndarray:
    """The cut and every horizon after it whose window is whole, in microseconds; none where the log ends too early."""
    end_us = evaluated_until(int(events.times.max(initial=0)), timeline) if end_us is None else end_us
    return np.arange(timeline.cut_us, end_us, timeline.horizon_us)


def evaluated_until(last_us: int, timeline: TimelineSettings) -> int:
    """End of the last whole window of a log whose last event lies at `last_us`; the cut where none is whole."""
    whole = max((hour_end(last_us) - timeline.cut_us) // timeline.horizon_us, 0)
    return timeline.cut_us + whole * timeline.horizon_us


def validation_anchors(events: Events, timeline: TimelineSettings) -> Anchors:
    """Anchors of the validation users before the cut, with the demands of evaluation; of about `MOST_VALIDATION_USERS`
    where there are more.

    They lie at the validation time and every horizon after it while the window is whole; where the horizon is longer
    than the time to the cut there is one, its window ending at the cut.
    """
    share = min(timeline.validation_share, MOST_VALIDATION_USERS / max(len(events.users), 1))
    chosen = validation_users(events.users, share)
    span = min(timeline.horizon_us, timeline.cut_us - timeline.validation_us)
    times = np.arange(timeline.validation_us, timeline.cut_us - span + 1, span)
    users = np.tile(np.flatnonzero(chosen).astype(np.int32), len(times))
    times = np.repeat(times, np.count_nonzero(chosen))
    return _measurable(events, _anchors(events, users, times, times + span), timeline)


def served_anchors(
    events: Events, time_us: int, min_negatives: int, min_history: int, window_end_us: int | None = None
) -> Anchors:
    """The users that a night at time_us predicts for, by their history alone: enough rejections and distinct items.

    Their windows end at window_end_us; without it they are empty.
    """
    users = np.arange(len(events.users), dtype=np.int32)
    times = np.full(len(users), time_us)
    ends = times if window_end_us is None else np.full(len(users), window_end_us)
    anchors = _anchors(events, users, times, ends)
    rejected = np.concatenate(([0], np.cumsum(events.kinds == REJECTED, dtype=np.int64)))
    anchors = anchors.take(rejected[anchors.ends] - rejected[anchors.starts] >= min_negatives)
    everything = Ragged(events.items, np.arange(len(events) + 1))
    return anchors.take(distinct(everything, anchors.starts, anchors.ends).lengths >= min_history)


def _anchors(events: Events, users: np.ndarray, times: np.ndarray, window_ends: np.ndarray) -> Anchors:
    """Anchors of user rows at times, whose windows end at the given times (included)."""
    return Anchors(
        users,
        times,
        events.offsets[users],
        _events_until(events, users, times),
        _events_until(events, users, np.maximum(window_ends, times)),
    )


def _events_until(events: Events, users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Position behind the user's last event with time <= t, by bisection of all users' ranges at once."""
    low, high = events.offsets[users], events.offsets[users + 1]
    while (open_ := low < high).any():
        middle = (low + high) // 2
        earlier = open_ & (events.times[np.minimum(middle, len(events) - 1)] <= times)
        low = np.where(earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)
    return low


def _measurable(events: Events, anchors: Anchors, timeline: TimelineSettings) -> Anchors:
    rejected, liked = (
        np.concatenate(([0], np.cumsum(events.kinds == kind, dtype=np.int64))) for kind in (REJECTED, LIKED)
    )
    anchors = anchors.take(
        (rejected[anchors.ends] > rejected[anchors.starts])
        & (liked[anchors.ends] > liked[anchors.starts])
        & (rejected[anchors.window_ends] > rejected[anchors.ends])
    )
    everything = Ragged(events.items, np.arange(len(events) + 1))
    history = distinct(everything, anchors.starts, anchors.ends)
    return anchors.take(history.lengths >= timeline.min_history)
