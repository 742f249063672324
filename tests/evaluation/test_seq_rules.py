"""Counted rules against a loop over every pair of rejections, and what they may read."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from conrec.config import DAY_US, TimelineSettings
from conrec.errors import DataError
from conrec.evaluation import seq_rules
from conrec.evaluation.baselines import Histories
from conrec.evaluation.seq_rules import fit_rules, tune_rules
from conrec.evaluation.tuning import RuleTrial, Trial, TrialResult
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, Events

ITEMS, USERS = 12, 30
CUT = 20 * DAY_US
TIMELINE = TimelineSettings(cut="1970-01-21T00:00:00Z", horizon_days=3, validation_days=3, min_history=2)
TRIAL = RuleTrial(4.0, 3.0)


def events_of(rows: list[tuple[int, int, float, int]]) -> Events:
    """(user, item, day, kind) each."""
    rows = sorted(rows, key=lambda row: (row[0], row[2]))
    users, items, days, kinds = (np.array(column) for column in zip(*rows, strict=True))
    offsets = np.searchsorted(users, np.arange(USERS + 1))
    names = pa.array([f"u{user:02d}" for user in range(USERS)])
    return Events(names, offsets, items.astype(np.int32), (days * DAY_US).astype(np.int64), kinds.astype(np.int8))


def random_log(last_day: float = 20.0) -> list[tuple[int, int, float, int]]:
    random = np.random.default_rng(0)
    log = random.integers(0, USERS, 400), random.integers(0, ITEMS, 400), random.uniform(0, last_day, 400)
    kinds = random.choice([REJECTED, LIKED], 400)
    return [(int(user), int(item), float(day), int(kind)) for user, item, day, kind in zip(*log, kinds, strict=True)]


def at_the_cut(events: Events) -> Histories:
    past = events.before(CUT)
    starts, ends = past.offsets[:-1], past.offsets[1:]
    users = np.arange(USERS, dtype=np.int32)
    return Histories.at(past, Anchors(users, np.full(USERS, CUT), starts, ends, ends))


def plain_scores(events: Events, steps: int) -> np.ndarray:
    """Shape: (USERS, ITEMS)."""
    weights, shares = np.zeros((ITEMS, ITEMS)), np.zeros(ITEMS)
    rejected = []
    for user in range(USERS):
        of_user = range(events.offsets[user], events.offsets[user + 1])
        own = [(events.items[place], events.times[place]) for place in of_user if events.kinds[place] == REJECTED]
        rejected.append([item for item, _ in own])
        for place, (item, time) in enumerate(own):
            recent = 0.5 ** ((CUT - time) / (TRIAL.half_life_days * DAY_US))
            shares[item] += recent
            for before in range(max(place - steps, 0), place):
                weights[own[before][0], item] += recent / (place - before)
    shares /= shares.sum()
    scores = np.zeros((USERS, ITEMS))
    for user, items in enumerate(rejected):
        for back, item in enumerate(items[::-1][:steps], start=1):
            rule = (weights[item] + TRIAL.prior * shares) / (weights[item].sum() + TRIAL.prior)
            scores[user] += rule / back
        if not items:
            scores[user] = shares
    return scores


@pytest.mark.parametrize("steps", [2, 50])
def test_scores_are_those_of_a_loop_over_pairs(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """User 0 rejected nothing and gets everybody's shares."""
    monkeypatch.setattr(seq_rules, "STEPS", steps)
    events = events_of([row for row in random_log() if row[0] or row[3] == LIKED])
    found = fit_rules(events, CUT, ITEMS, TRIAL).scores(at_the_cut(events))
    np.testing.assert_allclose(found, plain_scores(events, steps), rtol=1e-5)


def test_nothing_after_the_cut_and_no_like_is_counted() -> None:
    log = random_log()
    later = [(user, 3, 20.5, REJECTED) for user in range(USERS)]
    liked = [(user, 3, 10.5, LIKED) for user in range(USERS)]
    known = at_the_cut(events_of(log))
    sound = fit_rules(events_of(log), CUT, ITEMS, TRIAL).scores(known)
    np.testing.assert_array_equal(fit_rules(events_of(log + later + liked), CUT, ITEMS, TRIAL).scores(known), sound)
    read = fit_rules(events_of(log + later), CUT + DAY_US, ITEMS, TRIAL).scores(known)
    assert not np.array_equal(read, sound)


def test_the_better_trial_is_counted_until_the_cut() -> None:
    """Who rejects 0 rejects 1 next, and later 2, which is everybody's: a large prior hears of that alone."""
    log = [(user, user % 2 * 4, 10.0, REJECTED) for user in range(USERS)]
    log += [(user, user % 2 * 4 + 1, 10.0 + (1 if user < 20 else 8), REJECTED) for user in range(USERS)]
    log += [(user, 11, 9.0, LIKED) for user in range(USERS)]
    events = events_of(log + [(user, 5, 21.0, REJECTED) for user in range(USERS)])
    tuned = tune_rules(events, TIMELINE, ITEMS, (TRIAL, RuleTrial(4.0, 1e9)))
    assert [result.trial for result in tuned.trials] == [TRIAL, RuleTrial(4.0, 1e9)]
    assert tuned.chosen is tuned.trials[0]
    known = at_the_cut(events)
    expected = fit_rules(events, CUT, ITEMS, TRIAL).scores(known)
    np.testing.assert_array_equal(tuned.model.scores(known), expected)


def test_nobody_rejected_anything() -> None:
    with pytest.raises(DataError, match=r"SeqRules on negatives: nothing to count: .* check timeline\.cut"):
        fit_rules(events_of([(0, 1, 1.0, LIKED)]), CUT, ITEMS, TRIAL)


@pytest.mark.parametrize("trial", [Trial(32, 1e-3), RuleTrial(3.0, 5.0)])
def test_a_trial_comes_back_from_its_manifest(trial: Trial | RuleTrial) -> None:
    result = TrialResult(trial, 0.25, 3, 1.5)
    assert TrialResult.from_json(result.to_json()) == result
