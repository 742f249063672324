"""Events as arrays, the anchors set on them, and what each anchor asks a model to foretell.

An anchor is a user and a time t. Its history is the user's events with time <= t, its future window the events
in (t, t + horizon]. Invariant: nothing after the training cut is in a training anchor's window, and an
evaluation window is whole. Events are sorted by user and time once, so that a history and a window are two
ranges of one array and nothing is copied per anchor.

    events, unknown = encode_events(read_interactions(...), items["item_id"], max_unknown_share=0.01)
    anchors = training_anchors(events.before(timeline.cut_us), timeline)
    wanted = targets(events, anchors)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import TimelineSettings
from conrec.errors import DataError
from conrec.hashing import stable_hash
from conrec.ragged import Ragged, ranges
from conrec.tables import KINDS

if TYPE_CHECKING:
    from conrec.feedback.swing import Neighbours

REJECTED, LIKED, SHOWN = range(3)
_HOUR_US = 3_600_000_000
_BLOCK = 1 << 22


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


@dataclass(frozen=True)
class Targets:
    """What happens in the window of each anchor.

    Shape: next_negative (A,) int32 item row, -1 if nothing is rejected in the window; future_negatives and
    future_positives: A rows of distinct item rows, ascending.
    """

    next_negative: np.ndarray
    future_negatives: Ragged
    future_positives: Ragged

    def only(self, measured: np.ndarray) -> Targets:
        """These targets where `measured` (A,) bool holds, nothing elsewhere."""
        negatives, positives = (
            Ragged.from_lengths(wanted.values[measured[wanted.rows]], wanted.lengths * measured)
            for wanted in (self.future_negatives, self.future_positives)
        )
        return Targets(np.where(measured, self.next_negative, -1).astype(np.int32), negatives, positives)


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
    nth = ranges(np.zeros(len(chosen), np.int64), chosen)
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


def log_end(events: Events) -> int:
    """The end of the last event's hour, in microseconds since 1970."""
    return _hour_end(int(events.times.max(initial=0)))


def evaluated_until(last_us: int, timeline: TimelineSettings) -> int:
    """End of the last whole window of a log whose last event lies at `last_us`; the cut where none is whole."""
    whole = max((_hour_end(last_us) - timeline.cut_us) // timeline.horizon_us, 0)
    return timeline.cut_us + whole * timeline.horizon_us


def _hour_end(time_us: int) -> int:
    return -(-time_us // _HOUR_US) * _HOUR_US


def validation_anchors(events: Events, timeline: TimelineSettings) -> Anchors:
    """Anchors of the validation users before the cut, with the demands of evaluation.

    They lie at the validation time and every horizon after it while the window is whole; where the horizon is longer
    than the time to the cut there is one, its window ending at the cut.
    """
    chosen = validation_users(events.users, timeline.validation_share)
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
    return anchors.take(_distinct(everything, anchors.starts, anchors.ends).lengths >= min_history)


def targets(events: Events, anchors: Anchors) -> Targets:
    """What is rejected and liked in the window of each anchor."""
    negatives = _of_kind(events, REJECTED)
    first, last = negatives.offsets[anchors.ends], negatives.offsets[anchors.window_ends]
    next_negative = np.full(len(anchors), -1, np.int32)
    next_negative[first < last] = negatives.values[first[first < last]]
    positives = _of_kind(events, LIKED)
    return Targets(
        next_negative,
        _distinct(negatives, anchors.ends, anchors.window_ends),
        _distinct(positives, anchors.ends, anchors.window_ends),
    )


def ground_truth_sets(wanted: Targets, neighbours: Neighbours, kappa: float) -> tuple[Ragged, np.ndarray]:
    """Future negatives with weight 1 and their Swing neighbours with weight kappa, distinct per anchor.

    Items that the anchor's user likes in the window never enter as neighbours.
    Shape: Ragged of A rows of item rows, ascending; weights (values,) float32.
    """
    observed, liked = wanted.future_negatives, wanted.future_positives
    width = len(neighbours.items)
    degrees = np.concatenate(([0], np.cumsum(neighbours.items.lengths[observed.values])))
    counts, items, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first, last in _blocks(observed.lengths + liked.lengths + np.diff(degrees[observed.offsets])):
        block = np.arange(first, last)
        sources = [observed.take(block), liked.take(block)]
        near = neighbours.items.take(sources[0].values)
        # The source is the key's last digit: of equal pairs the first one stands, observed before liked before
        # neighbour.
        keys = [3 * (part.rows * width + part.values) + place for place, part in enumerate(sources)]
        keys.append(3 * (np.repeat(sources[0].rows, near.lengths) * width + near.values) + 2)
        sorted_keys = np.sort(np.concatenate(keys))
        pairs, source = np.divmod(sorted_keys, 3)
        kept = np.diff(pairs, prepend=-1) != 0
        kept &= source != 1
        rows, values = np.divmod(pairs[kept], width)
        counts.append(np.bincount(rows, minlength=last - first))
        items.append(values.astype(np.int32))
        weights.append(np.where(source[kept] == 0, 1.0, kappa).astype(np.float32))
    return Ragged.from_lengths(np.concatenate(items), np.concatenate(counts)), np.concatenate(weights)


def _as_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


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
    history = _distinct(everything, anchors.starts, anchors.ends)
    return anchors.take(history.lengths >= timeline.min_history)


def _of_kind(events: Events, kind: int) -> Ragged:
    """Items of the events of one kind; offsets (N + 1,) tell how many lie before each event."""
    mask = events.kinds == kind
    return Ragged(events.items[mask], np.concatenate(([0], np.cumsum(mask, dtype=np.int64))))


def _distinct(items: Ragged, first_events: np.ndarray, last_events: np.ndarray) -> Ragged:
    """The distinct items of each event range (A,), ascending, in blocks of ranges so that memory stays bounded."""
    starts = items.offsets[first_events]
    lengths = items.offsets[last_events] - starts
    width = int(items.values.max(initial=0)) + 1
    counts, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for first, last in _blocks(lengths):
        block = slice(first, last)
        row = np.repeat(np.arange(last - first), lengths[block])
        keys = np.unique(row * width + items.values[ranges(starts[block], lengths[block])])
        counts.append(np.bincount(keys // width, minlength=last - first))
        values.append((keys % width).astype(np.int32))
    return Ragged.from_lengths(np.concatenate(values), np.concatenate(counts))


def _blocks(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows that hold about `_BLOCK` values each, whatever the rows' lengths."""
    work = np.concatenate(([0], np.cumsum(lengths)))
    borders = np.searchsorted(work, np.arange(1, work[-1] // _BLOCK + 1) * _BLOCK)
    borders = np.unique(np.concatenate(([0], borders, [len(lengths)])))
    yield from zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
