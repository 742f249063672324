"""The score and its thresholds: fitted and calibrated on the windows before the cut.

Everything that decides here stands at the validation time: the catalogue and the policy that were made of what lay
before it, what is counted, and everybody who had a history then. Their windows, until the cut, say what became of it.
Half of the users that a night at that hour would predict for calibrate the thresholds, on the lists that the guardrails
leave: the very code of the night. All others fit the score.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec.blocklist.asking import Policy
from conrec.blocklist.calibrate import Calibration, at_best, calibrate
from conrec.blocklist.counts import Counts, things_of
from conrec.blocklist.ranking import Answers, Ranking, Scores, held_at, listing, published
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Linear, Score, fit_linear
from conrec.catalogue.items import Catalogue
from conrec.config import Config
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.histories import rejections_in_history
from conrec.feedback.outcomes import Outcomes, first_meetings
from conrec.hashing import mix, stable_hash
from conrec.parallel import Mapped, in_process
from conrec.progress import progress
from conrec.ragged import Ragged, pairs


@dataclass(frozen=True)
class Scoring:
    """What the night ranks and cuts by; `everybody`: the thresholds of the one list that is the same for all users."""

    score: Score
    calibration: Calibration
    everybody: Calibration


def calibration_anchors(events: Events, config: Config, min_negatives: int, min_history: int) -> Anchors:
    """Users with so much history at the validation time, with their windows until the cut."""
    timeline = config.timeline
    end_us = timeline.validation_us + min(timeline.horizon_us, timeline.cut_us - timeline.validation_us)
    return served_anchors(events, timeline.validation_us, min_negatives, min_history, end_us)


def _calibrating(events: Events, anchors: Anchors) -> np.ndarray:
    """Which of the served anchors calibrate: half of the users, by a stable hash of their own. Shape: (A,) bool."""
    return mix(stable_hash(events.users.take(pa.array(anchors.users)))) % np.uint64(2) == 1


def uncalibrated(config: Config, events: Events) -> str | None:
    """Why no policy could calibrate a threshold: too few users; None where one may. `events` reach to the cut."""
    limits = config.guardrails
    anchors = calibration_anchors(events, config, limits.min_negatives, limits.min_history)
    outcomes = first_meetings(events, anchors)
    has_like = np.zeros(len(anchors), bool)
    has_like[outcomes.anchors[outcomes.kinds == LIKED]] = True
    checks = _calibrating(events, anchors)
    return at_best(rejections_in_history(events, anchors)[checks], has_like[checks], config.calibration).silent()


def threshold_warnings(config: Config, events: Events) -> list[str]:
    """Says when nothing will be predicted for anybody, because too few users can calibrate the threshold."""
    silent = uncalibrated(config, events)
    if silent is None:
        return []
    timeline, limits = config.timeline, config.guardrails
    return [
        f"nothing will be predicted: {silent}. They are users with guardrails.min_negatives = {limits.min_negatives} "
        f"rejections and guardrails.min_history = {limits.min_history} items until the validation time, which is "
        f"timeline.validation_days = {timeline.validation_days:g} before timeline.cut, and a like after it; a larger "
        "calibration.alpha needs fewer"
    ]


MOST_EXPOSED = 300
"""Items a user among which `exposure` is fitted: those that EASE and freshness expect. Among all items, everything
that is hardly ever shown would decide the fit."""
EXPOSURE_USERS = 2000
"""Users on whom it is fitted, at most."""
FITTED_USERS = 100_000
"""Users on whom the score is fitted and calibrated, about so many, drawn where there are more."""
COUNTED_ODDS = "odds of what is counted"


@dataclass(frozen=True)
class Fitting:
    """What the score is fitted and calibrated on: everything as it stood at the validation time, and what came of it.

    Shape: A anchors, one a user with a history; served: positions of those that a night would predict for, ascending;
    calibrates (A,) bool, the half of these that calibrates. All others fit.
    """

    config: Config
    catalogue: Catalogue
    events: Events
    anchors: Anchors
    outcomes: Outcomes
    counts: Counts
    served: np.ndarray
    calibrates: np.ndarray

    @classmethod
    def of(
        cls,
        config: Config,
        catalogue: Catalogue,
        events: Events,
        everybody: Iterable[Events] | None = None,
        mapped: Mapped = in_process,
    ) -> Fitting:
        """Of the earlier catalogue and the events until the cut; counts those until the validation time.

        `everybody`: the events of all users, bucket by bucket, where `events` are those of a sample: what is counted of
        things is counted over all, by `mapped`.
        """
        anchors, limits = calibration_anchors(events, config, 0, 1), config.guardrails
        of_night = calibration_anchors(events, config, limits.min_negatives, limits.min_history)
        served = np.flatnonzero(np.isin(anchors.users, of_night.users))
        calibrates = np.zeros(len(anchors), bool)
        calibrates[served] = _calibrating(events, anchors.take(served))
        log, things = everybody or [events], things_of(catalogue)
        counted = Counts.over(log, config.timeline.validation_us, things, mapped=mapped)
        return cls(
            config,
            catalogue,
            events,
            anchors,
            first_meetings(events, anchors),
            counted.among(events),
            served,
            calibrates,
        )

    def of_nobody(self) -> Scoring:
        """The score where a night would serve nobody: it knows nothing, and predicts nothing."""
        nothing, settings = Linear({}, 0.0), self.config
        nobody = at_best(np.zeros(0, np.int64), np.zeros(0, bool), settings.calibration)
        return Scoring(Score(Estimate(nothing, nothing), None, settings.score.reach), nobody, nobody)

    def fit(self, policy: Policy) -> tuple[Scoring, Answers]:
        """Asks the policy, fits and calibrates; also what it generated for the users that calibrated."""
        asks, checks = self.asked_rows()
        with progress("  asking the policy", len(asks) + len(checks)) as bar:
            fitted_on = policy.generate(self.anchors.take(asks), bar.advance)
            calibrated_on = policy.generate(self.anchors.take(checks), bar.advance)
        with progress("  fitting the score"):
            counted = self.counted()
            score = Score(counted, self.judged(counted, policy, asks, fitted_on), self.config.score.reach)
            return self.cut(score, calibrated_on), calibrated_on

    def cut(self, score: Score, answers: Answers) -> Scoring:
        """A fitted score with the thresholds on it; `answers`: what was generated for the users that calibrate."""
        _, checks = self.asked_rows()
        return Scoring(score, self.calibrated(score, checks, answers), self.for_everybody(score))

    def asked_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the served anchors that the policy is asked about: those that fit, those that calibrate."""
        drawn = np.random.default_rng(self.config.seed).permutation(self.served)[: self.config.calibration.max_users]
        rows = np.sort(drawn)
        return rows[~self.calibrates[rows]], rows[self.calibrates[rows]]

    def answers(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """The counted columns of what those who fit rejected or liked, whether they rejected, and the users."""
        answered = self._answered(np.flatnonzero(~self.calibrates))
        users = self.anchors.users[answered.anchors]
        return self.counts.columns(users, answered.items), answered.kinds == REJECTED, users

    def answered_items(self) -> np.ndarray:
        """The items of `answers`, (N,) item rows."""
        return self._answered(np.flatnonzero(~self.calibrates)).items

    def counted(self) -> Estimate:
        """The score of everything, by what is counted."""
        columns, rejected, _ = self.answers()
        odds = fit_linear(columns, self.counts.odds_names, rejected)
        rows, things = self._most_exposed()
        columns = self.counts.columns(self.anchors.users[rows], things)
        return Estimate(odds, fit_linear(columns, self.counts.exposure_names, self._was_shown(rows, things)))

    def judged(self, counted: Estimate, policy: Policy, rows: np.ndarray, answers: Answers) -> Estimate:
        """The score with what the policy says; `answers` is what it generated for the anchors at `rows`, ascending.

        The policy is asked about few, so that only its part and the scale of what is counted are fitted on them.
        """
        trie = policy.catalogue.trie
        answered = self._answered(rows)
        answered = answered.take(trie.item_leaves[answered.items] >= 0)
        columns = self.counts.columns(self.anchors.users[answered.anchors], answered.items)
        place, leaves = np.searchsorted(rows, answered.anchors), trie.item_leaves[answered.items].astype(np.int64)
        columns |= policy.says(self.anchors.take(rows), place, leaves)
        columns[COUNTED_ODDS] = counted.odds.of(columns)
        odds, rejected = counted.odds, answered.kinds == REJECTED
        # A sample that only rejects, or only likes, says nothing of the policy, and nothing against what is counted.
        if 0 < rejected.sum() < len(rejected):
            odds = fit_linear(columns, (COUNTED_ODDS, LOG_PROB, VERDICT), rejected)
            odds = odds.unfolded(COUNTED_ODDS, counted.odds)

        generated = trie.leaf_items.take(answers.leaves.values)
        each = np.repeat(np.arange(len(answers.leaves.values)), generated.lengths)
        users = self.anchors.users[rows[answers.leaves.rows[each]]]
        # What was met is no longer there to be met.
        new = ~self.counts.has_met(users, generated.values)
        each, users, items = each[new], users[new], generated.values[new]
        columns = self.counts.columns(users, items) | {LOG_PROB: answers.log_probs[each]}
        shown = self._was_shown(rows[answers.leaves.rows[each]], items)
        return Estimate(odds, fit_linear(columns, (*self.counts.exposure_names, LOG_PROB), shown))

    def calibrated(self, score: Scores, rows: np.ndarray, answers: Answers) -> Calibration:
        """The thresholds of any score, on the lists of the anchors at `rows`, ascending, all of the other half."""
        ranking = Ranking(self.counts, score, self.catalogue.trie, self.catalogue.live)
        checked, limits = self.anchors.take(rows), self.config.guardrails
        liked = self.outcomes.take((self.outcomes.kinds == LIKED) & np.isin(self.outcomes.anchors, rows))
        places, rejections = np.searchsorted(rows, liked.anchors), rejections_in_history(self.events, checked)
        way = (ranking, self.events, checked.users, answers, self.config.timeline.validation_us, limits)

        def on_lists_without(held: np.ndarray, at_least: Calibration | None = None) -> Calibration:
            scores = listing(published(*way, held), places, liked.items, len(ranking.live), {}).scores
            likes = Ragged.from_rows(places, scores, len(checked))
            return calibrate(likes, rejections, self.config.calibration, at_least)

        held = np.zeros(len(ranking.live), bool)
        calibration = on_lists_without(held)
        # What is held back makes room in capped lists for what else is liked. Thresholds only rise from here, and the
        # higher they are the fewer items are held back: until a night at these thresholds holds back just these.
        while limits.max_user_share < 1:
            tonight = held_at(*way, calibration.thresholds(rejections))
            if np.array_equal(tonight, held):
                break
            held, calibration = tonight, on_lists_without(tonight, calibration)
        return calibration

    def for_everybody(self, score: Score) -> Calibration:
        """The thresholds of one list for all users, on the half that did not fit; one stratum, since it knows none."""
        liked = self.outcomes.take(self.outcomes.kinds == LIKED)
        liked = liked.take(self.calibrates[liked.anchors])
        scores = Ragged.from_rows(liked.anchors, score.for_everybody(self.counts)[liked.items], len(self.anchors))
        settings = self.config.calibration.model_copy(update={"strata": ()})
        return calibrate(scores, np.zeros(len(self.anchors), np.int64), settings)

    def _answered(self, rows: np.ndarray) -> Outcomes:
        chosen = np.isin(self.outcomes.anchors, rows) & np.isin(self.outcomes.kinds, (REJECTED, LIKED))
        return self.outcomes.take(chosen)

    def _most_exposed(self) -> tuple[np.ndarray, np.ndarray]:
        counts = self.counts
        fresh = counts.of_things["fresh"][: counts.things.item_count]
        most = min(MOST_EXPOSED, len(fresh))
        rows, things = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        chosen = self.served[~self.calibrates[self.served]][:EXPOSURE_USERS]
        for start in range(0, len(chosen), counts.block):
            block = chosen[start : start + counts.block]
            expected = counts.expected(self.anchors.users[block])[:, : len(fresh)] + fresh
            expected[counts.met[self.anchors.users[block]].nonzero()] = -np.inf
            best = np.argpartition(-expected, most - 1, axis=1)[:, :most]
            new = np.isfinite(np.take_along_axis(expected, best, axis=1))
            rows.append(np.repeat(block, new.sum(axis=1)))
            things.append(best[new])
        return np.concatenate(rows), np.concatenate(things)

    def _was_shown(self, rows: np.ndarray, things: np.ndarray) -> np.ndarray:
        width = len(self.counts.things)
        return np.isin(pairs(rows, things, width), pairs(self.outcomes.anchors, self.outcomes.items, width))
