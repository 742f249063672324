"""The score and its thresholds, as an artefact of their own: fitted and calibrated on the windows before the cut.

Everything that decides here stands at the validation time: the catalogue and the policy that were made of what lay
before it, what is counted, and everybody who had a history then. Their windows, until the cut, say what became of it.
Half of the users that a night at that hour would predict for calibrate the thresholds, on the lists that the guardrails
leave: the very code of the night. All others fit the score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.blocklist.batches import judged_beams
from conrec.blocklist.calibrate import Calibration, at_best, calibrate
from conrec.blocklist.counts import Counts, Things
from conrec.blocklist.engines import Engine, TorchEngine
from conrec.blocklist.ranking import Asked, Ranking, Scores, listing, published
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Linear, Score, fit_linear
from conrec.config import Config
from conrec.feedback.anchors import Anchors, served_anchors
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.outcomes import Outcomes, first_meetings
from conrec.hashing import mix, stable_hash
from conrec.policy.prompts import build_prompts
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import Catalogue, read_events, rejections_in_history
from conrec.stages.new_items import load_catalogue
from conrec.stages.train import liked_leaves, make_earlier_catalogue, validated

MOST_EXPOSED = 300
"""Items a user among which `exposure` is fitted: those that EASE and freshness expect. Among all items, everything
that is hardly ever shown would decide the fit."""
EXPOSURE_USERS = 2000
"""Users on whom it is fitted, at most."""
_BLOCK = 512
COUNTED_ODDS = "odds of what is counted"


@dataclass(frozen=True)
class Scoring:
    """What the night ranks and cuts by; `everybody`: the thresholds of the one list that is the same for all users."""

    score: Score
    calibration: Calibration
    everybody: Calibration


def scoring(run: Artefacts) -> Scoring:
    """The score and the thresholds for what these settings serve, read or made. The policy must be trained."""
    artefact = run["calibration"]
    if artefact.read() is None:
        began = time.perf_counter()
        made, asked = _fit(run)
        storage.write_json(artefact.path("score.json"), made.score.to_json())
        storage.write_json(artefact.path("calibration.json"), made.calibration.to_json())
        storage.write_json(artefact.path("everybody.json"), made.everybody.to_json())
        storage.write_table(asked.to_arrow(), artefact.path("asked.parquet"))
        artefact.finish({"threshold": made.calibration.overall.threshold}, time.perf_counter() - began)
    return Scoring(
        Score.from_json(storage.read_json(artefact.path("score.json"))),
        Calibration.from_json(storage.read_json(artefact.path("calibration.json"))),
        Calibration.from_json(storage.read_json(artefact.path("everybody.json"))),
    )


def asked_to_calibrate(run: Artefacts) -> Asked:
    """What the policy generated for the users that calibrated, second of `Fitting.asked_rows`; after `scoring`."""
    return Asked.from_arrow(storage.read_table(run["calibration"].path("asked.parquet")))


def things_of(catalogue: Catalogue) -> Things:
    """What can be blocked, with its category where the items have one."""
    categories = catalogue.categories
    attributes = {} if categories is None else {"category": categories}
    return Things.of(catalogue.semantic_ids, catalogue.trie, attributes)


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


def _fit(run: Artefacts) -> tuple[Scoring, Asked]:
    config, fitting = run.config, Fitting.load(run)
    if not len(fitting.served):
        nothing = Linear({}, 0.0)
        nobody = at_best(np.zeros(0, np.int64), np.zeros(0, bool), config.calibration)
        return Scoring(Score(Estimate(nothing, nothing), None, config.score.reach), nobody, nobody), Asked.nothing(0)
    validated(run)
    asks, checks = fitting.asked_rows()
    with storage.local_folder(run["validated"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, fitting.catalogue.trie)
    policy = Policy(engine, fitting.catalogue, fitting.events, config)
    with progress("  asking the policy", len(asks) + len(checks)) as bar:
        fitted_on = policy.generate(fitting.anchors.take(asks), bar.advance)
        calibrated_on = policy.generate(fitting.anchors.take(checks), bar.advance)
    with progress("  fitting the score"):
        counted = fitting.counted()
        score = Score(counted, fitting.judged(counted, policy, asks, fitted_on), config.score.reach)
        calibration = fitting.calibrated(score, checks, calibrated_on)
        return Scoring(score, calibration, fitting.for_everybody(score)), calibrated_on


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
    def load(cls, run: Artefacts) -> Fitting:
        """Reads the earlier catalogue and the events until the cut, and counts those until the validation time."""
        config = run.config
        make_earlier_catalogue(run)
        catalogue = load_catalogue(run.earlier, config.timeline.cut_us)
        events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
        anchors, limits = calibration_anchors(events, config, 0, 1), config.guardrails
        of_night = calibration_anchors(events, config, limits.min_negatives, limits.min_history)
        served = np.flatnonzero(np.isin(anchors.users, of_night.users))
        calibrates = np.zeros(len(anchors), bool)
        calibrates[served] = _calibrating(events, anchors.take(served))
        counts = Counts.at(events, config.timeline.validation_us, things_of(catalogue))
        return cls(config, catalogue, events, anchors, first_meetings(events, anchors), counts, served, calibrates)

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

    def counted(self) -> Estimate:
        """The score of everything, by what is counted."""
        columns, rejected, _ = self.answers()
        odds = fit_linear(columns, self.counts.odds_names, rejected)
        rows, things = self._most_exposed()
        columns = self.counts.columns(self.anchors.users[rows], things)
        return Estimate(odds, fit_linear(columns, self.counts.exposure_names, self._was_shown(rows, things)))

    def judged(self, counted: Estimate, policy: Policy, rows: np.ndarray, asked: Asked) -> Estimate:
        """The score with what the policy says; `asked` is what it generated for the anchors at `rows`, ascending.

        The policy is asked about few, so that only its part and the scale of what is counted are fitted on them.
        """
        trie = policy.catalogue.trie
        answered = self._answered(rows)
        answered = answered.take(trie.item_leaves[answered.items] >= 0)
        columns = self.counts.columns(self.anchors.users[answered.anchors], answered.items)
        place, leaves = np.searchsorted(rows, answered.anchors), trie.item_leaves[answered.items].astype(np.int64)
        columns |= policy.says(self.anchors.take(rows), place, leaves)
        columns[COUNTED_ODDS] = counted.odds.of(columns)
        odds = fit_linear(columns, (COUNTED_ODDS, LOG_PROB, VERDICT), answered.kinds == REJECTED)
        odds = odds.unfolded(COUNTED_ODDS, counted.odds)

        generated = trie.leaf_items.take(asked.leaves.values)
        each = np.repeat(np.arange(len(asked.leaves.values)), generated.lengths)
        users = self.anchors.users[rows[asked.leaves.rows[each]]]
        # What was met is no longer there to be met.
        new = ~self.counts.has_met(users, generated.values)
        each, users, items = each[new], users[new], generated.values[new]
        columns = self.counts.columns(users, items) | {LOG_PROB: asked.log_probs[each]}
        shown = self._was_shown(rows[asked.leaves.rows[each]], items)
        return Estimate(odds, fit_linear(columns, (*self.counts.exposure_names, LOG_PROB), shown))

    def calibrated(self, score: Scores, rows: np.ndarray, asked: Asked) -> Calibration:
        """The thresholds of any score, on the lists of the anchors at `rows`, ascending, all of the other half."""
        ranking = Ranking(self.counts, score, self.catalogue.trie, self.catalogue.live)
        checked, now_us = self.anchors.take(rows), self.config.timeline.validation_us
        liked = self.outcomes.take((self.outcomes.kinds == LIKED) & np.isin(self.outcomes.anchors, rows))
        places = np.searchsorted(rows, liked.anchors)
        lists = published(ranking, self.events, checked.users, asked, now_us, self.config.guardrails)
        scores = listing(lists, places, liked.items, len(ranking.live), {}).scores
        likes = Ragged.from_rows(places, scores, len(checked))
        return calibrate(likes, rejections_in_history(self.events, checked), self.config.calibration)

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
        return np.isin(rows * width + things, self.outcomes.anchors * width + self.outcomes.items)


@dataclass(frozen=True)
class Policy:
    """A policy that answers for anchors: what it generates, and what it says of given leaves."""

    engine: Engine
    catalogue: Catalogue
    events: Events
    config: Config

    def generate(self, anchors: Anchors, advance: Callable[[int], None] = lambda _: None) -> Asked:
        """What the night would generate for these anchors."""
        parts = []
        for rows in self._blocks(anchors):
            block = anchors.take(rows)
            liked = liked_leaves(self.catalogue, self.events, block)
            found = judged_beams(self.engine, self._prompts(block), liked, self.config.generate.beam_width)
            parts.append(Asked.of_dense(*found))
            advance(len(rows))
        return Asked.joined(parts)

    def says(self, anchors: Anchors, rows: np.ndarray, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """`log_prob` and `verdict` of pairs. Shape: rows (N,) positions of anchors, ascending; leaves (N,) -> (N,)."""
        asked = Ragged.from_rows(rows, leaves, len(anchors))
        found = {name: np.zeros(len(leaves), np.float32) for name in (LOG_PROB, VERDICT)}
        for block in self._blocks(anchors):
            dense = asked.take(block).padded(-1)
            prompts = self._prompts(anchors.take(block))
            place = slice(asked.offsets[block[0]], asked.offsets[block[-1] + 1])
            if dense.size:
                log_probs, verdicts = self.engine.score_and_judge(prompts, dense)
                found[LOG_PROB][place], found[VERDICT][place] = log_probs[dense >= 0], verdicts[dense >= 0]
        return found

    def _blocks(self, anchors: Anchors) -> Iterator[np.ndarray]:
        for start in range(0, len(anchors), _BLOCK):
            yield np.arange(start, min(start + _BLOCK, len(anchors)))

    def _prompts(self, anchors: Anchors) -> Ragged:
        semantic_ids, vocabulary = self.catalogue.semantic_ids, self.engine.vocabulary
        return build_prompts(self.events, anchors, semantic_ids, vocabulary, self.config.prompt)
