"""The score and its thresholds, as an artefact of their own: fitted and calibrated on the windows before the cut.

Everything that decides here stands at the validation time: the catalogue and the policy that were made of what lay
before it, what is counted, and the users that a night at that hour would predict for. Their windows, until the cut, say
what became of it. One half of the users fits the score, the other half calibrates the thresholds on the lists that the
guardrails leave: the very code of the night.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.blocklist.calibrate import Calibration, at_best, calibrate
from conrec.blocklist.counts import Counts, Things
from conrec.blocklist.engines import Engine, TorchEngine
from conrec.blocklist.generate import generated_and_judged
from conrec.blocklist.ranking import Asked, Ranking, listing, published
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Score, fit_linear
from conrec.config import Config
from conrec.feedback.anchors import LIKED, REJECTED, Anchors, Events, served_anchors
from conrec.feedback.outcomes import Outcomes, first_meetings
from conrec.hashing import mix, stable_hash
from conrec.policy.prompts import build_prompts
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import Catalogue, read_events, rejections_in_history
from conrec.stages.new_items import load_catalogue
from conrec.stages.train import liked_leaves, validated

MOST_EXPOSED = 300
"""Items a user among which `exposure` is fitted: those that EASE and freshness expect. Among all items, everything
that is hardly ever shown would decide the fit."""
EXPOSURE_USERS = 2000
"""Users on whom it is fitted, at most."""
_BLOCK = 512


@dataclass(frozen=True)
class Scoring:
    """What the night ranks and cuts by."""

    score: Score
    calibration: Calibration


def scoring(run: Artefacts) -> Scoring:
    """The score and the thresholds for what these settings serve, read or made. The policy must be trained."""
    artefact = run["calibration"]
    if artefact.read() is None:
        began = time.perf_counter()
        made = _fit(run)
        storage.write_json(artefact.path("score.json"), made.score.to_json())
        storage.write_json(artefact.path("calibration.json"), made.calibration.to_json())
        artefact.finish({"threshold": made.calibration.overall.threshold}, time.perf_counter() - began)
    return Scoring(
        Score.from_json(storage.read_json(artefact.path("score.json"))),
        Calibration.from_json(storage.read_json(artefact.path("calibration.json"))),
    )


def things_of(catalogue: Catalogue) -> Things:
    """What can be blocked, with its category where the items have one."""
    categories = catalogue.categories
    attributes = {} if categories is None else {"category": categories}
    return Things.of(catalogue.semantic_ids, catalogue.trie, attributes)


def calibration_anchors(events: Events, config: Config) -> Anchors:
    """The users that a night at the validation time would predict for, with their windows until the cut."""
    timeline, limits = config.timeline, config.guardrails
    end_us = timeline.validation_us + min(timeline.horizon_us, timeline.cut_us - timeline.validation_us)
    return served_anchors(events, timeline.validation_us, limits.min_negatives, limits.min_history, end_us)


def _fitting(events: Events, anchors: Anchors) -> np.ndarray:
    """Which anchors fit the score: half of the users, by a stable hash of their own. Shape: (A,) bool."""
    return mix(stable_hash(events.users.take(pa.array(anchors.users)))) % np.uint64(2) == 0


def uncalibrated(config: Config, events: Events) -> str | None:
    """Why no policy could calibrate a threshold: too few users; None where one may. `events` reach to the cut."""
    anchors = calibration_anchors(events, config)
    outcomes = first_meetings(events, anchors)
    has_like = np.zeros(len(anchors), bool)
    has_like[outcomes.anchors[outcomes.kinds == LIKED]] = True
    checks = ~_fitting(events, anchors)
    return at_best(rejections_in_history(events, anchors)[checks], has_like[checks], config.calibration).silent()


def _fit(run: Artefacts) -> Scoring:
    config, now_us = run.config, run.config.timeline.validation_us
    validated(run)
    catalogue = load_catalogue(run.earlier, config.timeline.cut_us)
    events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
    anchors = calibration_anchors(events, config)
    counts = Counts.at(events, now_us, things_of(catalogue))
    fits = _fitting(events, anchors)
    sample = np.random.default_rng(config.seed).permutation(len(anchors))[: config.calibration.max_users]
    asks, checks = np.sort(sample[fits[sample]]), np.sort(sample[~fits[sample]])
    with storage.local_folder(run["validated"].path("checkpoint")) as folder:
        policy = Policy(TorchEngine.load(folder, catalogue.trie), catalogue, events, config)
    with progress("  asking the policy", len(sample)) as bar:
        fitted_on = policy.generate(anchors.take(asks), bar.advance)
        calibrated_on = policy.generate(anchors.take(checks), bar.advance)
    samples = Samples.of(counts, events, anchors, fits)
    score = Score(samples.counted(counts), samples.judged(counts, policy, asks, fitted_on), config.score.reach)
    ranking = Ranking(counts, score, catalogue.trie, catalogue.live)
    checked = anchors.take(checks)
    likes = scores_of_likes(ranking, events, checked, calibrated_on, config)
    return Scoring(score, calibrate(likes, rejections_in_history(events, checked), config.calibration))


def scores_of_likes(ranking: Ranking, events: Events, anchors: Anchors, asked: Asked, config: Config) -> Ragged:
    """The score in the published list of every item that a user likes in the window and had not met; a row an anchor.

    The anchors are of one time.
    """
    liked = first_meetings(events, anchors)
    liked = liked.take(liked.kinds == LIKED)
    lists = (
        published(ranking, events, anchors.users, asked, int(anchors.times[0]), config.guardrails, ranking.live)
        if len(anchors)
        else iter(())
    )
    scores = listing(lists, liked.anchors, liked.items, len(ranking.live), {}).scores
    return Ragged.from_rows(liked.anchors, scores, len(anchors))


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
            parts.append(generated_and_judged(self.engine, self._prompts(block), liked, self.config.generate))
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
                found[LOG_PROB][place] = self.engine.score(prompts, dense)[dense >= 0]
                found[VERDICT][place] = self.engine.judge(prompts, dense)[dense >= 0]
        return found

    def _blocks(self, anchors: Anchors) -> Iterator[np.ndarray]:
        for start in range(0, len(anchors), _BLOCK):
            yield np.arange(start, min(start + _BLOCK, len(anchors)))

    def _prompts(self, anchors: Anchors) -> Ragged:
        semantic_ids, vocabulary = self.catalogue.semantic_ids, self.engine.vocabulary
        return build_prompts(self.events, anchors, semantic_ids, vocabulary, self.config.prompt)


@dataclass(frozen=True)
class Samples:
    """What the score is fitted on: the anchors of the fitting half, and what they met first in their windows."""

    anchors: Anchors
    fits: np.ndarray
    outcomes: Outcomes
    shown: np.ndarray
    """Shape: ascending int64, anchor * T + item of every outcome."""

    @classmethod
    def of(cls, counts: Counts, events: Events, anchors: Anchors, fits: np.ndarray) -> Samples:
        """Of anchors, of which `fits` (A,) bool name the fitting half."""
        outcomes = first_meetings(events, anchors)
        return cls(anchors, fits, outcomes, outcomes.anchors * len(counts.things) + outcomes.items)

    def counted(self, counts: Counts) -> Estimate:
        """The score of everything, by what is counted."""
        answered = self._answered(np.flatnonzero(self.fits))
        columns = counts.columns(self.anchors.users[answered.anchors], answered.items)
        odds = fit_linear(columns, counts.odds_names, answered.kinds == REJECTED)
        rows, things = self._most_exposed(counts)
        columns = counts.columns(self.anchors.users[rows], things)
        exposure = fit_linear(columns, counts.exposure_names, self._was_shown(counts, rows, things))
        return Estimate(odds, exposure)

    def judged(self, counts: Counts, policy: Policy, rows: np.ndarray, asked: Asked) -> Estimate:
        """The score with what the policy says; `asked` is what it generated for the anchors at `rows`, ascending."""
        item_leaves, leaf_items = policy.catalogue.trie.item_leaves, policy.catalogue.trie.leaf_items
        answered = self._answered(rows)
        answered = answered.take(item_leaves[answered.items] >= 0)
        columns = counts.columns(self.anchors.users[answered.anchors], answered.items)
        place = np.searchsorted(rows, answered.anchors)
        columns |= policy.says(self.anchors.take(rows), place, item_leaves[answered.items].astype(np.int64))
        odds = fit_linear(columns, (*counts.odds_names, LOG_PROB, VERDICT), answered.kinds == REJECTED)

        items = leaf_items.take(asked.leaves.values)
        each = np.repeat(np.arange(len(asked.leaves.values)), items.lengths)
        rows = rows[asked.leaves.rows[each]]
        columns = counts.columns(self.anchors.users[rows], items.values) | {LOG_PROB: asked.log_probs[each]}
        shown = self._was_shown(counts, rows, items.values)
        return Estimate(odds, fit_linear(columns, (*counts.exposure_names, LOG_PROB), shown))

    def _answered(self, rows: np.ndarray) -> Outcomes:
        chosen = np.isin(self.outcomes.anchors, rows) & np.isin(self.outcomes.kinds, (REJECTED, LIKED))
        return self.outcomes.take(chosen)

    def _most_exposed(self, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        fresh = counts.of_things["fresh"][: counts.things.item_count]
        most = min(MOST_EXPOSED, len(fresh))
        parts = []
        chosen = np.flatnonzero(self.fits)[:EXPOSURE_USERS]
        for start in range(0, len(chosen), counts.block):
            block = chosen[start : start + counts.block]
            expected = counts.expected(self.anchors.users[block])[:, : len(fresh)] + fresh
            expected[counts.met[self.anchors.users[block]].nonzero()] = -np.inf
            parts.append((np.repeat(block, most), np.argpartition(-expected, most - 1, axis=1)[:, :most].ravel()))
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rows, things = (np.concatenate(column) for column in zip(*parts, strict=True))
        return rows, things

    def _was_shown(self, counts: Counts, rows: np.ndarray, things: np.ndarray) -> np.ndarray:
        return np.isin(rows * len(counts.things) + things, self.shown)
