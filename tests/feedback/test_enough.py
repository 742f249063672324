"""Too little to train on, to decide by or to measure is refused with counts and settings, before any work."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from conrec.config import TimelineSettings
from conrec.errors import DataError, TooLittleDataError
from conrec.feedback.anchors import evaluation_anchors, evaluation_times, validation_anchors, validation_users
from conrec.feedback.enough import evaluation_warnings, require_evaluation, require_training, require_tuning
from conrec.feedback.events import Events, encode_events

CUT = datetime(2026, 1, 1, tzinfo=UTC)
KINDS = {"-": "negative", "+": "positive", "o": "neutral"}
LIKES = [(-6, "o", 1), (-5, "-", 0), (-4, "+", 1), (-1, "+", 2)]
REJECTS = [(-6, "o", 1), (-5, "-", 0), (-4, "+", 1), (-1, "-", 2)]
BOTH = [*REJECTS, (-0.5, "+", 3)]


def timeline(**changed) -> TimelineSettings:
    base = {"cut": CUT, "horizon_days": 2, "validation_days": 2, "validation_share": 0.5, "min_history": 2}
    return TimelineSettings.model_validate(base | changed)


def users_of(share: float, validation: bool) -> list[str]:
    """A few user ids that a share makes validation users, or does not."""
    names = pa.array([f"user{number}" for number in range(40)])
    return names.filter(pa.array(validation_users(names, share) == validation)).to_pylist()[:3]


VALIDATION, OTHERS = users_of(0.5, True), users_of(0.5, False)


def log(histories: dict[str, list[tuple[float, str, int]]]) -> Events:
    rows = [(user, *event) for user, events in histories.items() for event in events]
    users, days, kinds, items = zip(*rows, strict=True)
    table = pa.table(
        {
            "user_id": list(users),
            "item_id": [f"i{item}" for item in items],
            "timestamp": pa.array([CUT + timedelta(days=day) for day in days], pa.timestamp("us", "UTC")),
            "feedback": [KINDS[kind] for kind in kinds],
        }
    )
    return encode_events(table, pa.array([f"i{item}" for item in range(10)]), 0.0)[0]


def refused(call, *arguments) -> str:
    with pytest.raises(TooLittleDataError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize("stages", [0, 2])
def test_no_rejection_until_the_cut_is_nothing_to_train_on(stages):
    events = log({"a": [(-3, "+", 0), (-2, "o", 1), (0.001, "-", 2)]})
    message = refused(require_training, events, timeline(), stages)
    for part in (
        "no rejection until timeline.cut = 2026-01-01T00:00:00Z",
        "2 of the events",
        "3 events, 1 of them rejections",
        "2025-12-29T00:00:00Z to 2026-01-01T00:01:26Z",
        "interactions.rules",
    ):
        assert part in message
    require_training(log({"a": [(-3, "+", 0), (0, "-", 2)]}), timeline(), 0)


def test_a_cut_before_the_log_is_told_with_the_remedy():
    empty = log({"a": [(3, "-", 0), (4, "+", 1)]}).before(int(CUT.timestamp() * 1e6))
    for stages in (0, 2):
        message = refused(require_training, empty, timeline(), stages)
        assert "no rejection until timeline.cut = 2026-01-01T00:00:00Z, where 0 of the events lie" in message
        assert "the log holds no event until then. Move timeline.cut after the first rejections" in message
    assert "the log holds no event until then" in refused(require_tuning, empty, timeline())
    anchors = evaluation_anchors(empty, timeline())
    end_us = int((CUT + timedelta(days=2)).timestamp() * 1e6)
    message = refused(require_evaluation, empty, anchors, timeline(), end_us)
    assert "the log holds no event until then. Move timeline.cut" in message


def test_stages_need_a_rejection_behind_another_event():
    alone = {user: [(-4, "-", 1)] for user in OTHERS}
    decisive = {VALIDATION[0]: [(-9, "-", 4), (-6, "+", 5), (-1, "-", 6), (-0.5, "+", 7)]}
    message = refused(require_training, log(alone | decisive), timeline(), 1)
    assert (
        "follows another event" in message and "timeline.horizon_days = 2" in message and "grpo.stages = []" in message
    )
    require_training(log(alone | decisive | {"z": [(-4, "o", 0), (-3, "-", 1)]}), timeline(), 1)
    require_training(log(alone), timeline(), 0)


@pytest.mark.parametrize(
    ("histories", "changed", "counts"),
    [
        # Nobody is a validation user.
        (dict.fromkeys(OTHERS, BOTH), {}, ("none of 0 validation anchors", "0 of 3 users are validation users")),
        # They are, and like nothing after the validation time.
        (
            dict.fromkeys(VALIDATION + OTHERS, REJECTS),
            {},
            ("none of 3 validation anchors", "3 of 6 users are", "of 3 users 3 have 2 distinct items", "0 do both"),
        ),
        # They are, and reject nothing after it.
        (
            dict.fromkeys(VALIDATION, LIKES) | dict.fromkeys(OTHERS, BOTH),
            {},
            ("none of 0 validation anchors", "0 reject something after it"),
        ),
        # They are, with a history too short.
        (
            dict.fromkeys(VALIDATION + OTHERS, BOTH),
            {"min_history": 9},
            ("none of 0 validation anchors", "of 3 users 0 have 9 distinct items", "timeline.min_history = 9"),
        ),
        # They are, and the validation time lies before everything but a stranger's past.
        (
            dict.fromkeys(VALIDATION + OTHERS, BOTH) | {"early": [(-70, "o", 1), (-60, "-", 0)]},
            {"validation_days": 40, "horizon_days": 60},
            ("none of 0 validation anchors", "timeline.validation_days = 40 before"),
        ),
    ],
)
def test_stages_over_which_nothing_decides_are_refused(histories, changed, counts):
    events, settings = log(histories), timeline(**({"horizon_days": 4} | changed))
    message = refused(require_training, events, settings, 3)
    for part in (*counts, "the 3 stages of GRPO", "Write grpo.stages = []", "timeline.validation_share = 0.5"):
        assert part in message, message
    assert all(part in refused(require_tuning, events, settings) for part in counts)
    # Without stages nothing need be decided.
    require_training(events, settings, 0)


def test_one_anchor_with_a_like_decides():
    events = log({VALIDATION[0]: BOTH, OTHERS[0]: BOTH})
    assert len(validation_anchors(events, timeline(horizon_days=4))) == 1
    require_training(events, timeline(horizon_days=4), 3)
    require_tuning(events, timeline(horizon_days=4))


def test_what_every_user_did_after_the_validation_time_is_no_training():
    """The validation time lies before the log, whose anchors lie at later windows."""
    events, before = log(dict.fromkeys(VALIDATION, BOTH)), timeline(validation_days=10)
    assert len(validation_anchors(events, before)) > 0
    message = refused(require_training, events, before, 0)
    assert "every rejection until timeline.cut lies after the validation time" in message
    assert "timeline.validation_days = 10" in message
    # Nor is what users did who decide nothing: a policy that decides has seen nobody's days after it.
    others = dict.fromkeys(VALIDATION + OTHERS, BOTH)
    assert "every rejection" in refused(require_training, log(others), before, 0)
    require_training(log(others | {"early": [(-11, "-", 0)]}), before, 0)
    message = refused(require_tuning, events, before)
    assert "0 rejections and 0 likes lie until the validation time 2025-12-22T00:00:00Z" in message


@pytest.mark.parametrize(
    ("last_day", "horizon", "remedy"),
    [
        # The cut is the last event's hour, or lies after it.
        (0, 2, "Write timeline.cut = 2025-12-30T00:00:00Z or an earlier one"),
        (-1, 2, "Write timeline.cut = 2025-12-29T00:00:00Z or an earlier one"),
        # The horizon reaches beyond the log.
        (1.5, 2, "timeline.cut = 2025-12-31T12:00:00Z or an earlier one, or timeline.horizon_days = 1.5 or less"),
        (1.99, 30, "Lower timeline.horizon_days well below the 8.0 days of the log"),
        (-1, 300, "Lower timeline.horizon_days well below the 5.0 days of the log"),
    ],
)
def test_a_log_that_ends_before_the_first_window_cannot_be_evaluated(last_day, horizon, remedy):
    events = log({"a": [(-6, "-", 0), (-5, "+", 1), (last_day, "-", 2)]})
    settings = timeline(horizon_days=horizon)
    anchors = evaluation_anchors(events, settings)
    message = refused(require_evaluation, events, anchors, settings)
    for part in (
        "nothing to evaluate",
        f"timeline.horizon_days = {horizon} after timeline.cut = 2026-01-01T00:00:00Z",
        "3 events, 2 of them rejections, from 2025-12-26T00:00:00Z",
        remedy,
    ):
        assert part in message, message
    # What the message says to write makes a window whole.
    for name, value in re.findall(r"timeline\.(cut|horizon_days) = (\S+?),? or (?:less|an earlier)", message):
        changed = timeline(**({"horizon_days": horizon} | {name: value}))
        assert len(evaluation_times(events, changed)) == 1


def test_without_anybody_to_measure_the_evaluation_is_refused_with_counts():
    # One user without a like before, one without a rejection after.
    events = log({"a": [(-5, "-", 0), (-4, "o", 1), (1, "-", 2)], "b": [*BOTH, (1, "+", 4)], "c": [(3, "o", 5)]})
    anchors = evaluation_anchors(events, timeline())
    message = refused(require_evaluation, events, anchors, timeline())
    for part in ("of 3 users 1 have 2 distinct items", "1 reject something after it, 0 do both", "min_history"):
        assert part in message
    with_like = log({"b": [*BOTH, (1, "-", 4), (1.5, "+", 5)], "c": [(3, "o", 5)]})
    anchors = evaluation_anchors(with_like, timeline())
    require_evaluation(with_like, anchors, timeline())
    assert evaluation_warnings(with_like, anchors) == []


def test_an_evaluation_that_cannot_measure_harm_says_so():
    events = log({"b": [*BOTH, (1, "-", 4)], "c": [(3, "o", 5)]})
    anchors = evaluation_anchors(events, timeline())
    require_evaluation(events, anchors, timeline())
    (line,) = evaluation_warnings(events, anchors)
    assert "none of the 1 evaluation anchors has a like" in line and "FPH" in line


def test_every_row_of_an_unknown_item_is_no_log():
    table = pa.table(
        {
            "user_id": ["a"],
            "item_id": ["x"],
            "timestamp": pa.array([CUT], pa.timestamp("us", "UTC")),
            "feedback": ["negative"],
        }
    )
    with pytest.raises(DataError, match="1 of 1 rows"):
        encode_events(table, pa.array(["y"]), 1.0)
