"""Does the log hold enough to train, to decide and to measure? Counted before the work, from the events alone.

    require_training(events, timeline, stages=3)     # raises, before anything is trained
    require_evaluation(events, evaluation_anchors(events, timeline), timeline)

Refused is what could only end in nothing: no rejection to learn from, stages of GRPO over which nothing can decide, no
anchor to measure. What merely takes a part away is a line to print. Every message holds the counts, and the settings
that decide them.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from conrec.config import DAY_US, TimelineSettings
from conrec.errors import TooLittleDataError
from conrec.feedback.anchors import Anchors, evaluation_times, training_anchors, validation_anchors, validation_users
from conrec.feedback.events import LIKED, REJECTED, Events, log_end
from conrec.feedback.targets import targets
from conrec.ragged import pairs


def require_training(events: Events, timeline: TimelineSettings, stages: int) -> None:
    """Raises `TooLittleDataError` where nothing can be learned until the cut, or nothing can decide over the stages.

    `stages`: how many stages of GRPO the settings name.
    """
    known = events.times <= timeline.cut_us
    if not (known & (events.kinds == REJECTED)).any():
        raise TooLittleDataError(
            f"nothing to train on: no rejection until timeline.cut = {_when(timeline.cut_us)}, where "
            f"{np.count_nonzero(known):,} of the events lie; {_log(events)}. Move timeline.cut after the first "
            "rejections, or mend what becomes a rejection in interactions.rules"
        )
    anchors = validation_anchors(events, timeline)
    history = events.before(timeline.validation_us)
    if len(anchors) and not (history.kinds == REJECTED).any():
        raise TooLittleDataError(
            "nothing to train the policy on that decides over GRPO and calibrates the threshold: every rejection until "
            f"timeline.cut lies after the validation time; {validation_counts(events, timeline)}. Lower "
            "timeline.validation_days"
        )
    if stages:
        _require_grpo(events, history, anchors, timeline, stages)


def _require_grpo(events: Events, history: Events, anchors: Anchors, timeline: TimelineSettings, stages: int) -> None:
    """`history` may train, `anchors` decide."""
    if not len(training_anchors(history, timeline)):
        raise TooLittleDataError(
            "nothing for GRPO to learn from: no rejection that may train follows another event of its user within "
            f"timeline.horizon_days = {timeline.horizon_days:g}; {_log(events)}. Write grpo.stages = [], or a longer "
            "horizon"
        )
    if not measured_likes(events, anchors).any():
        raise TooLittleDataError(
            f"nothing decides over the {stages} stages of GRPO, which are accepted by what they catch and what it "
            f"costs in likes: none of {len(anchors):,} validation anchors has a like in its window; "
            f"{validation_counts(events, timeline)}. Write grpo.stages = [], or {_more_anchors(timeline)}"
        )


def require_tuning(events: Events, timeline: TimelineSettings) -> None:
    """Raises `TooLittleDataError` unless the systems to beat can be tuned, and their stages decided over.

    They are tuned on the validation anchors of all users; the policies among them have stages of GRPO whatever the
    settings say.
    """
    anchors = validation_anchors(events, timeline)
    if not measured_likes(events, anchors).any():
        raise TooLittleDataError(
            'nothing to tune the systems of evaluation.systems = "all" by: none of '
            f"{len(anchors):,} validation anchors has a like in its window; {validation_counts(events, timeline)}. "
            f'Write evaluation.systems = "ours", or {_more_anchors(timeline)}'
        )
    before = events.kinds[events.times <= timeline.validation_us]
    if not {REJECTED, LIKED} <= set(np.unique(before).tolist()):
        raise TooLittleDataError(
            'nothing to fit the systems of evaluation.systems = "all" on while they are tuned: '
            f"{np.count_nonzero(before == REJECTED):,} rejections and {np.count_nonzero(before == LIKED):,} likes lie "
            f"until the validation time {_when(timeline.validation_us)}; {_log(events)}. Write evaluation.systems = "
            f'"ours", or lower timeline.validation_days = {timeline.validation_days:g}'
        )


def require_evaluation(events: Events, anchors: Anchors, timeline: TimelineSettings, end_us: int | None = None) -> None:
    """Raises `TooLittleDataError` where there is no evaluation anchor; `anchors` are those of `evaluation_anchors`."""
    if len(anchors):
        return
    if not len(evaluation_times(events, timeline, end_us)):
        raise TooLittleDataError(
            f"nothing to evaluate: the log ends before the first window does, timeline.horizon_days = "
            f"{timeline.horizon_days:g} after timeline.cut = {_when(timeline.cut_us)}; {_log(events)}. "
            f"{_whole_window(events, timeline)}"
        )
    end_us = end_us or log_end(events)
    raise TooLittleDataError(
        "nothing to evaluate: no user is an evaluation anchor, with a history until it and a rejection in the window "
        f"after it: {_counts(events, timeline, timeline.cut_us, end_us, 'timeline.cut')}; windows are "
        f"timeline.horizon_days = {timeline.horizon_days:g} long and end by the end of the log; {_log(events)}. Move "
        "timeline.cut, or lower timeline.min_history"
    )


def evaluation_warnings(events: Events, anchors: Anchors) -> list[str]:
    """What the evaluation of these anchors will leave undefined."""
    if measured_likes(events, anchors).any():
        return []
    return [
        f"none of the {len(anchors):,} evaluation anchors has a like in its window: FPH, Lift and the catch at a "
        "false-block rate stay undefined; look at timeline.cut, and at what becomes positive in interactions.rules"
    ]


def measured_likes(events: Events, anchors: Anchors) -> np.ndarray:
    """Which anchors have a like in their window: those on which harm can be measured. Shape: (A,) bool."""
    return targets(events, anchors).future_positives.lengths > 0


def validation_counts(events: Events, timeline: TimelineSettings) -> str:
    """How many users pass each demand on a validation anchor, in words."""
    chosen = validation_users(events.users, timeline.validation_share)
    return (
        f"{np.count_nonzero(chosen):,} of {len(events.users):,} users are validation users (timeline.validation_share "
        f"= {timeline.validation_share:g}); "
        + _counts(events, timeline, timeline.validation_us, timeline.cut_us, "the validation time", chosen)
        + f"; the validation time is timeline.validation_days = {timeline.validation_days:g} before timeline.cut = "
        f"{_when(timeline.cut_us)}; {_log(events)}"
    )


def _counts(
    events: Events, timeline: TimelineSettings, time_us: int, end_us: int, name: str, chosen: np.ndarray | None = None
) -> str:
    """How many users have the history that an anchor at this time needs, and what they do after it until the end."""
    chosen = np.ones(len(events.users), bool) if chosen is None else chosen
    before, after = events.times <= time_us, (events.times > time_us) & (events.times <= end_us)
    rows = events.rows
    width = int(events.items.max(initial=0)) + 1
    met = np.unique(pairs(rows[before], events.items[before], width))
    history = np.bincount(met // width, minlength=len(chosen)) >= timeline.min_history
    for kind in (REJECTED, LIKED):
        history &= np.bincount(rows[before & (events.kinds == kind)], minlength=len(chosen)) > 0
    rejects, likes = (
        np.bincount(rows[after & (events.kinds == kind)], minlength=len(chosen)) > 0 for kind in (REJECTED, LIKED)
    )
    masks = (chosen, chosen & history, chosen & rejects, chosen & history & rejects & likes)
    several, enough, rejecting, whole = (f"{np.count_nonzero(mask):,}" for mask in masks)
    return (
        f"of {several} users {enough} have {timeline.min_history} distinct items (timeline.min_history), a rejection "
        f"and a like among them, until {name}, {rejecting} reject something after it, {whole} do both and like "
        "something, too"
    )


def _log(events: Events) -> str:
    """Events, rejections, first and last time of what was read of the log: until the time that the message names."""
    if not len(events):
        return "the log holds no event until then"
    rejections = np.count_nonzero(events.kinds == REJECTED)
    return (
        f"the log holds {len(events):,} events, {rejections:,} of them rejections, from "
        f"{_when(int(events.times.min()))} to {_when(int(events.times.max()))}"
    )


def _whole_window(events: Events, timeline: TimelineSettings) -> str:
    """What to write so that one window is whole."""
    first, end = int(events.times.min()), log_end(events)
    if end - timeline.horizon_us <= first:
        days = (end - first) / DAY_US
        return f"Lower timeline.horizon_days well below the {days:.1f} days of the log, and move timeline.cut into it"
    earlier = f"Write timeline.cut = {_when(end - timeline.horizon_us)} or an earlier one"
    left = np.floor((end - timeline.cut_us) / DAY_US * 100) / 100
    return f"{earlier}, or timeline.horizon_days = {left:g} or less" if left > 0 else earlier


def _more_anchors(timeline: TimelineSettings) -> str:
    return (
        f"raise timeline.validation_share = {timeline.validation_share:g} or timeline.validation_days = "
        f"{timeline.validation_days:g}, or lower timeline.min_history = {timeline.min_history}"
    )


def _when(time_us: int) -> str:
    """`2026-01-01T00:00:00Z`, as a settings file takes it."""
    return datetime.fromtimestamp(time_us // 1_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
