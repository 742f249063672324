"""Nothing that is to be foretold may be known: checks of the arrays themselves, whatever code made them.

    check_no_leak(events, anchors, targets, histories, training=past, cut_us=settings.timeline.cut_us)
    check_training_anchors(history, training_anchors(history, settings.timeline), settings.timeline.cut_us)

A history holds events of the anchor's user up to the anchor, a target is an event of the window, the window lies behind
everything that training read. It is events that are compared, not items: an item that was rejected before may be
rejected again, and then it is rightly in the history and among the targets.

Invariant: the checks read times and users of the events and take no range of an anchor on trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from conrec.errors import DataError
from conrec.feedback.events import LIKED, REJECTED
from conrec.ragged import Ragged, pairs, ranges
from conrec.tables import KINDS

if TYPE_CHECKING:
    from conrec.evaluation.baselines import Histories
    from conrec.feedback.anchors import Anchors
    from conrec.feedback.events import Events
    from conrec.feedback.targets import Targets


def check_no_leak(
    events: Events, anchors: Anchors, targets: Targets, histories: Histories, training: Events, cut_us: int
) -> None:
    """Raises `DataError` naming user, item and time unless the evaluation of these anchors is sound.

    `training` are the events that anything was fitted on (Swing, floors, trained models, the order of items of one
    semantic ID); `histories` are what systems are shown.
    1. No training event lies after the cut, and no window begins before it.
    2. History and window of an anchor are its user's events up to its time, and after it.
    3. A history holds no event more often than the user had it up to the anchor.
    4. Every target was rejected, or liked, in the window.
    Raises ValueError when there is not one row of everything per anchor.
    """
    for name, length in (
        ("targets", len(targets.next_negative)),
        ("targets.future_negatives", len(targets.future_negatives)),
        ("targets.future_positives", len(targets.future_positives)),
        ("histories", len(histories)),
    ):
        if length != len(anchors):
            raise ValueError(f"{name} has {length} rows for {len(anchors)} anchors; give one per anchor")
    late = np.flatnonzero(training.times > cut_us)
    if len(late):
        _refuse(training, int(late[0]), f"training reads it, but the cut is at {_when(cut_us)}; cut with Events.before")
    _check_ranges(events, anchors)
    early = np.flatnonzero(anchors.times < cut_us)
    if len(early):
        user, time = events.users[int(anchors.users[early[0]])], _when(int(anchors.times[early[0]]))
        raise DataError(
            f"user {user}: the anchor at {time} lies before the training cut at {_when(cut_us)}, so its window is no "
            "future; evaluate at the cut or later"
        )
    _check_histories(events, anchors, histories)
    following = targets.next_negative >= 0
    next_negative = Ragged.from_lengths(targets.next_negative[following], following.astype(np.int64))
    _check_targets(events, anchors, next_negative, REJECTED, "next_negative")
    _check_targets(events, anchors, targets.future_negatives, REJECTED, "future_negatives")
    _check_targets(events, anchors, targets.future_positives, LIKED, "future_positives")


def check_training_anchors(events: Events, anchors: Anchors, cut_us: int) -> None:
    """Raises `DataError` naming user, item and time when a training anchor reads beyond itself or the cut.

    The window is what training learns to foretell: its last event must not lie after the cut.
    """
    _check_ranges(events, anchors)
    last = np.where(anchors.window_ends > anchors.starts, anchors.window_ends - 1, 0)
    late = np.flatnonzero((anchors.window_ends > anchors.starts) & _after(events, last, cut_us))
    if len(late):
        _refuse(
            events,
            int(last[late[0]]),
            f"it is in a training window that reaches past the cut at {_when(cut_us)}; end windows at the cut",
        )


def _check_ranges(events: Events, anchors: Anchors) -> None:
    """History and window are the user's events up to the anchor, and after it."""
    first, stop = events.offsets[anchors.users], events.offsets[anchors.users + 1]
    strange = np.flatnonzero(
        (anchors.starts < first)
        | (anchors.ends < anchors.starts)
        | (anchors.window_ends < anchors.ends)
        | (anchors.window_ends > stop)
    )
    if len(strange):
        user, time = events.users[int(anchors.users[strange[0]])], _when(int(anchors.times[strange[0]]))
        raise DataError(
            f"user {user}: the anchor at {time} reads events of another user; make anchors and histories from the "
            "same events"
        )
    # Within a user times ascend, so the last event of a history and the first of a window tell.
    last = np.maximum(anchors.ends - 1, 0)
    late = np.flatnonzero((anchors.ends > anchors.starts) & _after(events, last, anchors.times))
    if len(late):
        anchor = int(late[0])
        _refuse(
            events,
            int(last[anchor]),
            f"it is in the history of the anchor at {_when(int(anchors.times[anchor]))}; a history ends there",
        )
    early = np.flatnonzero((anchors.window_ends > anchors.ends) & ~_after(events, anchors.ends, anchors.times))
    if len(early):
        anchor = int(early[0])
        _refuse(
            events,
            int(anchors.ends[anchor]),
            f"it is in the window of the anchor at {_when(int(anchors.times[anchor]))}; a window begins after it",
        )


def _check_histories(events: Events, anchors: Anchors, histories: Histories) -> None:
    """No event is in a history more often than in the user's events up to the anchor."""
    wrong = np.flatnonzero(histories.users != anchors.users)
    if len(wrong):
        user = events.users[int(anchors.users[wrong[0]])]
        raise DataError(f"user {user}: the history is another user's; make it with Histories.at from these anchors")
    width = int(max(events.items.max(initial=0), histories.items.values.max(initial=0))) + 1
    held = _typed(histories.items.rows, histories.items.values, histories.kinds, width)
    lengths = anchors.ends - anchors.starts
    places = ranges(anchors.starts, lengths)
    past = np.sort(
        _typed(np.repeat(np.arange(len(anchors)), lengths), events.items[places], events.kinds[places], width)
    )
    held, counts = np.unique(held, return_counts=True)
    known = np.searchsorted(past, held, side="right") - np.searchsorted(past, held, side="left")
    unknown = np.flatnonzero(counts > known)
    if len(unknown):
        rest, kind = np.divmod(int(held[unknown[0]]), len(KINDS))
        anchor, item = np.divmod(rest, width)
        where, time = int(anchors.users[anchor]), int(anchors.times[anchor])
        own = np.arange(int(anchors.ends[anchor]), int(events.offsets[where + 1]))
        own = own[(events.items[own] == item) & (events.kinds[own] == kind)]
        problem = f"it is in the history of the anchor at {_when(time)}; make histories with Histories.at"
        if len(own):
            _refuse(events, int(own[0]), problem)
        raise DataError(f"user {events.users[where]}, item row {item} ({KINDS[kind]}), which never happened: {problem}")


def _check_targets(events: Events, anchors: Anchors, items: Ragged, kind: int, name: str) -> None:
    """Every target got the feedback `kind` between the anchor and the end of the window."""
    lengths = anchors.window_ends - anchors.ends
    places = ranges(anchors.ends, lengths)
    rows = np.repeat(np.arange(len(anchors)), lengths)
    inside = events.kinds[places] == kind
    width = int(max(events.items.max(initial=0), items.values.max(initial=0))) + 1
    keys = pairs(items.rows, items.values, width)
    future = pairs(rows[inside], events.items[places[inside]], width)
    foreign = np.flatnonzero(~np.isin(keys, future))
    if len(foreign):
        anchor, item = int(items.rows[foreign[0]]), int(items.values[foreign[0]])
        raise DataError(
            f"user {events.users[int(anchors.users[anchor])]}, item row {item} is among {name} of the anchor at "
            f"{_when(int(anchors.times[anchor]))}, but was not {KINDS[kind]} in its window; make targets with targets()"
        )


def _after(events: Events, places: np.ndarray, times: np.ndarray | int) -> np.ndarray:
    """Whether the events at the places lie after the times; places behind the last event never do. Shape: (A,)."""
    if not len(events):
        return np.zeros(len(places), bool)
    return events.times[np.minimum(places, len(events) - 1)] > times


def _typed(rows: np.ndarray, items: np.ndarray, kinds: np.ndarray, width: int) -> np.ndarray:
    """(row, item, kind) as one integer."""
    return pairs(pairs(rows, items, width), kinds, len(KINDS))


def _refuse(events: Events, place: int, problem: str) -> NoReturn:
    user = events.users[int(np.searchsorted(events.offsets, place, side="right")) - 1]
    raise DataError(
        f"user {user}, item row {events.items[place]} ({KINDS[events.kinds[place]]}) at "
        f"{_when(int(events.times[place]))}: {problem}"
    )


def _when(time_us: int) -> str:
    return str(np.datetime64(time_us, "us")) + "Z"
