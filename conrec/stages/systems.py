"""The systems of an evaluation: one artefact a row, so that a table of hours resumes where it was killed.

    for system in systems(config):
        row = system.row(world)        # predicts, or reads what an earlier run left

Floors and sequential models score all items; generative systems rank semantic IDs, which become items as in the night.
Policies that differ from the full method do so by settings alone: `rivals` and `ablations` list them.
Invariant: every system is fitted on events until the cut, predicts the same anchors, under the same exclusions, and
scores the same candidates.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.counts import Counts
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.ranking import Asked, Ranking
from conrec.blocklist.score import LOG_PROB, Estimate, Linear, Score
from conrec.config import Config
from conrec.evaluation.baselines import Histories, Scores, best_items, fit_floors, item_scores
from conrec.evaluation.candidates import Candidates, candidate_sets
from conrec.evaluation.leaks import check_no_leak
from conrec.evaluation.predictions import Task
from conrec.evaluation.published import shown_pairs
from conrec.evaluation.sequential import KINDS, TRIALS, tune
from conrec.evaluation.tiger import TIGER_TRIALS, tune_tiger
from conrec.feedback.anchors import Anchors, evaluation_anchors, served_anchors
from conrec.feedback.enough import evaluation_warnings, require_evaluation, require_tuning
from conrec.feedback.events import REJECTED, SHOWN, Events
from conrec.feedback.outcomes import first_meetings
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import Targets, targets
from conrec.policy.prompts import build_prompts
from conrec.policy.tasks import choices
from conrec.progress import progress, warn
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import (
    Catalogue,
    Items,
    item_shares,
    leaf_items_by_rejections,
    read_events,
    rejecting_users,
    scored_items,
)
from conrec.stages.new_items import known_items, load_catalogue
from conrec.stages.scoring import Scoring, scoring, things_of
from conrec.stages.train import liked_leaves, make_policy

LIST = 100
"""Items of a list, and beams of a policy at least: what a threshold of one for all users chooses from."""
_BLOCK = 512
_NEVER = -1e4
"""Exposure of what is not to be listed."""

BEFORE, AFTER = "before GRPO", "after GRPO"
FULL = "CoNRec, full method"
"""What the night ranks by: the fitted score, with what the policy after GRPO says."""

COUNTED = "CoNRec without the policy"
"""The same score of what is counted alone."""

UNPUNISHED = "+ future-negative reward"
"""The policy whose reward does not mind likes: gamma 0."""

Arrays = dict[str, np.ndarray]
"""What a row keeps of every anchor: named arrays (A, ...)."""


@dataclass(frozen=True)
class Row:
    """What a system predicts, and what it cost."""

    arrays: Arrays
    figures: dict[str, Any]
    """`training_seconds`, `parameters`, `users_per_second`, `trials`; absent where there is nothing to say."""


@dataclass(frozen=True)
class Predictions:
    """Items of each anchor with the scores that order them.

    Shape: items (A, LIST) int32 item rows, best first, -1 padding; scores (A, LIST) float32, -inf there; candidates
    (A, C) float32 score of each candidate, NaN where undefined.
    """

    items: np.ndarray
    scores: np.ndarray
    candidates: np.ndarray

    @classmethod
    def empty(cls, anchors: int, candidates: int) -> Predictions:
        """Nothing listed yet."""
        return cls(
            np.full((anchors, LIST), -1, np.int32),
            np.full((anchors, LIST), -np.inf, np.float32),
            np.full((anchors, candidates), np.nan, np.float32),
        )


@dataclass(frozen=True)
class World:
    """What all systems are measured on. Shape: A anchors; histories, targets, candidates have a row for each.

    The anchors are those of `evaluation_anchors`, which `measured` (A,) bool names, and beside them the others whom a
    night at the cut would serve and whose window judges a list: in `wanted` they want nothing.
    """

    run: Artefacts
    items: Items
    events: Events
    anchors: Anchors
    measured: np.ndarray
    wanted: Targets
    histories: Histories
    excluded: Ragged

    @classmethod
    def load(cls, run: Artefacts, encoded: bool = True) -> World:
        """Reads catalogue and interactions; unless `encoded`, the items without semantic IDs.

        Raises `TooLittleDataError` without anchors, `DataError` where an anchor's targets leak into what is read.
        """
        config, end_us = run.config, run.windows_end_us()
        # Where no window is whole, all of the log is read to say so.
        read_us = end_us if end_us > config.timeline.cut_us else run.sources.log.last_us
        items = load_catalogue(run, read_us) if encoded else known_items(run, read_us)
        events = read_events(config, items.item_ids, read_us)
        measured = evaluation_anchors(events, config.timeline, end_us)
        require_evaluation(events, measured, config.timeline, end_us)
        if config.evaluation.systems == "all":
            require_tuning(events, config.timeline)
        for line in evaluation_warnings(events, measured):
            warn(line)
        anchors, is_measured = with_served(events, measured, config)
        limit = config.evaluation.max_anchors
        if limit is not None and len(anchors) > limit:
            chosen = np.sort(np.random.default_rng(config.seed).permutation(len(anchors))[:limit])
            anchors, is_measured = anchors.take(chosen), is_measured[chosen]
        wanted, histories = targets(events, anchors), Histories.at(events, anchors)
        training = events.before(config.timeline.cut_us)
        check_no_leak(events, anchors, wanted, histories, training, config.timeline.cut_us)
        return cls(run, items, events, anchors, is_measured, wanted.only(is_measured), histories, histories.distinct())

    @property
    def config(self) -> Config:
        """The settings."""
        return self.run.config

    @property
    def catalogue(self) -> Catalogue:
        """The items, loaded with their semantic IDs."""
        assert isinstance(self.items, Catalogue)
        return self.items

    @cached_property
    def past(self) -> Events:
        """The events until the cut."""
        return self.events.before(self.config.timeline.cut_us)

    @cached_property
    def served_rows(self) -> np.ndarray:
        """Which anchors are users that a night at the cut predicts for. Shape: (S,) int64, ascending."""
        limits, cut_us = self.config.guardrails, self.config.timeline.cut_us
        served = served_anchors(self.events, cut_us, limits.min_negatives, limits.min_history)
        return np.flatnonzero((self.anchors.times == cut_us) & np.isin(self.anchors.users, served.users))

    @cached_property
    def served(self) -> Anchors:
        """Those anchors, with the windows that judge their lists."""
        return self.anchors.take(self.served_rows)

    def counts(self, time_us: int) -> Counts:
        """What is counted at a moment: of users until then, of items until the cut."""
        if time_us not in self._counts:
            cut_us = self.config.timeline.cut_us
            self._counts[time_us] = Counts.at(self.events, time_us, things_of(self.catalogue), cut_us)
        return self._counts[time_us]

    @cached_property
    def _counts(self) -> dict[int, Counts]:
        return {}

    @cached_property
    def scoring(self) -> Scoring:
        """The score and the thresholds that the night takes."""
        return scoring(self.run)

    @cached_property
    def candidates(self) -> Candidates:
        """One future negative among items shown the same day, for each anchor."""
        return candidate_sets(self.events, self.anchors, targets(self.events, self.anchors), self.config.seed)

    @cached_property
    def candidate_leaves(self) -> np.ndarray:
        """Leaves of the candidates (A, C), -1 for padding."""
        items = self.candidates.items
        return np.where(items >= 0, self.catalogue.trie.item_leaves[items], -1).astype(np.int64)

    @cached_property
    def leaf_items(self) -> Ragged:
        """Items of each leaf, the most rejected first."""
        return leaf_items_by_rejections(self.catalogue.trie, self.past)

    @cached_property
    def shares(self) -> np.ndarray:
        """log of the share of each item in the rejections of its ID. Shape: (I,)."""
        return item_shares(self.catalogue.trie, self.past)

    @cached_property
    def liked_leaves(self) -> Ragged:
        """Leaves that each anchor's user has liked."""
        return liked_leaves(self.catalogue, self.events, self.anchors)

    @cached_property
    def rejections(self) -> np.ndarray:
        """Distinct items that each anchor's user has rejected. Shape: (A,)."""
        return self.histories.distinct((REJECTED,)).lengths

    @cached_property
    def item_rejections(self) -> np.ndarray:
        """Users who rejected each item before the cut. Shape: (I,)."""
        return rejecting_users(self.past, len(self.items.items))

    @cached_property
    def task(self) -> Task:
        """What a system from outside is asked."""
        pairs = shown_pairs(self.events, self.served)
        rows = self.served_rows[pairs.users]
        cut_us = self.config.timeline.cut_us
        return Task(self.events, self.items.items, self.anchors, self.measured, rows, pairs.items, cut_us)

    def by_scores(self, scores: Scores) -> tuple[Arrays, dict[str, Any]]:
        """Lists and candidates of a system that scores all items, and its speed."""
        began = time.perf_counter()
        items, values = best_items(scores, self.histories, self.excluded, LIST)
        figures = {"users_per_second": len(items) / (time.perf_counter() - began)}
        candidates = item_scores(scores, self.histories, self.candidates.items)
        return {"items": items, "scores": values, "candidates": candidates}, figures


def with_served(events: Events, measured: Anchors, config: Config) -> tuple[Anchors, np.ndarray]:
    """The anchors, and those that a night at the cut would serve and that the window tells something of.

    Returns A anchors, those of `evaluation_anchors` first, and (A,) bool which these are.
    """
    timeline, limits = config.timeline, config.guardrails
    end_us = timeline.cut_us + timeline.horizon_us
    served = served_anchors(events, timeline.cut_us, limits.min_negatives, limits.min_history, end_us)
    outcomes = first_meetings(events, served)
    judged = np.unique(outcomes.anchors[outcomes.kinds != SHOWN])
    known = measured.users[measured.times == timeline.cut_us]
    others = served.take(judged[~np.isin(served.users[judged], known)])
    both = (np.concatenate(pair) for pair in zip(measured.columns, others.columns, strict=True))
    return Anchors(*both), np.repeat([True, False], [len(measured), len(others)])


@dataclass(frozen=True)
class SystemSpec:
    """One row to be: its name, its group in the table, what decides it, and how it is made."""

    name: str
    group: str
    artefact: Artefact
    make: Callable[[World], Row] = field(repr=False)

    def row(self, world: World) -> Row:
        """The finished row, read or made."""
        manifest = self.artefact.read()
        if manifest is None:
            began = time.perf_counter()
            row = self.make(world)
            storage.write_table(_table(row.arrays), self.artefact.path("predictions.parquet"))
            manifest = self.artefact.finish(row.figures, time.perf_counter() - began)
        return Row(_arrays(storage.read_table(self.artefact.path("predictions.parquet"))), manifest["figures"])


def systems(run: Artefacts) -> list[SystemSpec]:
    """The rows that the settings ask for, in the order of the table."""
    config = run.config
    floors = SystemSpec("floors", "floor", _plan(run, "floors", {}), _floors)
    if config.evaluation.systems == "floors":
        return [floors]
    ours = [
        _policy(run, BEFORE, "ours", run, "supervised"),
        _policy(run, AFTER, "ours", run, "checkpoint"),
    ]
    if config.evaluation.systems == "ours":
        return [floors, *ours]
    sequential = [
        SystemSpec(kind, "sequential", _plan(run, kind, {"trials": _trials(TRIALS)}), partial(_sequential, kind))
        for kind in KINDS
    ]
    tiger = SystemSpec("TIGER", "generative", _plan(run, "TIGER", {"trials": _trials(TIGER_TRIALS)}), _tiger)
    generative, ablation = (
        [_policy(run, name, group, run.of(other), "checkpoint") for name, other in listed]
        for group, listed in (("generative", rivals(config)), ("ablation", ablations(config)))
    )
    return [floors, *sequential, tiger, *generative, *ablation, *ours]


def rivals(config: Config) -> list[tuple[str, Config]]:
    """Generative systems of other people, made of the project's own policy by settings alone."""
    # A history is read again before every rejection in it, so fewer passes: two of them read as many tokens as five do.
    passes = 0.4 * config.supervised.warmup_epochs
    next_only = {"alignment_epochs": 0.0, "warmup_target": "next_negative", "warmup_epochs": passes}
    no_stages: dict[str, Any] = {"stages": ()}
    steps = sum(stage.steps for stage in config.grpo.stages)
    s_dpo = {"name": "s_dpo", "blocks": ("negatives", "positives"), "steps": max(steps, 1), "beta": 1.0}
    return [
        (
            "LC-Rec, negatives only",
            changed(config, supervised=next_only | {"warmup_blocks": ("negatives",)}, grpo=no_stages),
        ),
        ("LC-Rec, negatives and positives", changed(config, supervised=next_only, grpo=no_stages)),
        (
            "next-negative warm-up only",
            changed(config, supervised=next_only | {"translation_epochs": 0.0}, grpo=no_stages),
        ),
        (
            "S-DPO instead of GRPO",
            # Its best weights stand as they are: what our stages may lose in FHR is no rule of the publication.
            changed(config, grpo={"stages": ({**s_dpo, "objective": "s_dpo"},), "tolerance": 1.0}),
        ),
    ]


def ablations(config: Config) -> list[tuple[str, Config]]:
    """The steps that lead to the policy before GRPO and from there to the one after it, cumulative."""
    return [
        ("translation and warm-up", changed(config, supervised={"alignment_epochs": 0.0}, grpo={"stages": ()})),
        ("+ progressive context", changed(config, grpo={"targets": "next_negative", "gamma": 0.0})),
        (UNPUNISHED, changed(config, grpo={"gamma": 0.0})),
    ]


ABLATION = (
    ("translation and warm-up", None),
    (BEFORE, "+ alignment"),
    ("+ progressive context", "+ progressive context"),
    (UNPUNISHED, UNPUNISHED),
    (AFTER, "+ positive penalty"),
    (FULL, "+ score"),
    (COUNTED, "- policy"),
)
"""Rows in order, each with the step that it adds to the row before, or takes from it."""


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The settings with some of a section's values replaced, checked again."""
    document = config.model_dump()
    for name, values in sections.items():
        document[name] = document[name] | dict(values)
    return Config.model_validate(document)


def alone(world: World, row: Row) -> tuple[np.ndarray, Predictions]:
    """A policy by its probabilities alone: its leaves (A, W), and the items and candidates that follow from them."""
    leaves = generated(world, row)
    scores = np.where(leaves >= 0, row.arrays["log_probs"], -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    leaves, scores = (np.take_along_axis(values, order, axis=1) for values in (leaves, scores))
    items, values = scored_items(leaves, scores, world.leaf_items, world.shares, world.excluded, LIST)
    candidates = row.arrays["candidates"] + world.shares[world.candidates.items]
    return leaves, Predictions(items, values, np.where(world.candidates.items >= 0, candidates, np.nan))


def generated(world: World, row: Row) -> np.ndarray:
    """The leaves that a policy generated for the anchors, -1 where the user has liked one. Shape: (A, W) int64."""
    leaves = row.arrays["leaves"].copy()
    width, liked = len(world.catalogue.trie), world.liked_leaves
    place = np.arange(len(leaves))[:, None] * width + leaves
    leaves[np.isin(place, liked.rows * width + liked.values)] = -1
    return leaves


def asked_of(world: World, row: Row) -> Asked:
    """What a policy said for the anchors, as a night asks it; a verdict of 0 where it was not asked for one."""
    log_probs = row.arrays["log_probs"]
    return Asked.of_dense(generated(world, row), log_probs, row.arrays.get("verdicts", np.zeros_like(log_probs)))


def ranked(world: World, row: Row | None, score: Score, reaches: Sequence[float]) -> dict[float, Predictions]:
    """The first items by a score at each reach, as the night ranks them; without a row, by what is counted alone."""
    anchors, item_count = world.anchors, len(world.catalogue.live)
    asked = Asked.nothing(len(anchors)) if row is None else asked_of(world, row)
    found = {reach: Predictions.empty(len(anchors), world.candidates.items.shape[1]) for reach in reaches}
    with progress("  ranking", len(anchors)) as bar:
        for time_us in np.unique(anchors.times):
            ranking = Ranking(world.counts(int(time_us)), score, world.catalogue.trie, world.catalogue.live)
            of_time = np.flatnonzero(anchors.times == time_us)
            for start in range(0, len(of_time), ranking.block):
                rows = of_time[start : start + ranking.block]
                parts = ranking.parts(anchors.users[rows], asked.take(rows))
                odds, exposure = (part[:, :item_count] for part in parts)
                met = world.excluded.take(rows)
                candidates = world.candidates.items[rows]
                for reach, predictions in found.items():
                    # Not squeezed into (0, 1), where those of a large reach would round to one number.
                    values = odds + np.float32(reach) * exposure
                    predictions.candidates[rows] = np.where(
                        candidates >= 0, np.take_along_axis(values, np.maximum(candidates, 0), axis=1), np.nan
                    )
                    values[met.rows, met.values] = -np.inf
                    best = np.argpartition(-values, min(LIST, item_count) - 1, axis=1)[:, :LIST]
                    order = np.lexsort((best, -np.take_along_axis(values, best, axis=1)), axis=1)
                    best = np.take_along_axis(best, order, axis=1)
                    scores, width = np.take_along_axis(values, best, axis=1), best.shape[1]
                    predictions.items[rows, :width] = np.where(np.isfinite(scores), best, -1)
                    predictions.scores[rows, :width] = scores
                bar.advance(len(rows))
    return found


def with_odds(score: Score) -> Score:
    """Our score for a policy of other people: the counted odds, and its own probability for the exposure.

    What it did not generate is not listed.
    """
    never = Linear({}, _NEVER)
    odds = score.counted.odds
    return Score(Estimate(odds, never), Estimate(odds, Linear({LOG_PROB: 1.0}, 0.0)), score.reach)


def floor_rows(row: Row) -> dict[str, Row]:
    """The floors, which share one artefact, as rows of their own."""
    return {
        name: Row({key: row.arrays[f"{name}/{key}"] for key in ("items", "scores", "candidates")}, figures)
        for name, figures in row.figures["floors"].items()
    }


# ---- how each is made ----


def _floors(world: World) -> Row:
    config, item_count = world.config, len(world.items.items)
    neighbours = swing_neighbours(world.past, item_count, config.swing, config.seed)
    arrays: Arrays = {}
    figures: dict[str, Any] = {}
    with progress("  floors") as bar:
        began = time.perf_counter()
        for floor in fit_floors(
            world.events, config.timeline.cut_us, item_count, world.items.categories, neighbours, config.seed
        ):
            fitting = time.perf_counter() - began
            found, speed = world.by_scores(floor.scores)
            arrays |= {f"{floor.name}/{key}": value for key, value in found.items()}
            figures[floor.name] = speed | {"training_seconds": fitting}
            bar.advance(note=floor.name)
            began = time.perf_counter()
    return Row(arrays, {"floors": figures})


def _sequential(kind: str, world: World) -> Row:
    config = world.config
    with progress(f"  {kind}") as bar:
        tuned = tune(
            kind,
            world.events,
            config.timeline,
            len(world.catalogue.semantic_ids),
            TRIALS,
            config.seed,
            lambda line: bar.advance(note=line),
        )
    arrays, figures = world.by_scores(tuned.scores)
    costs = {"training_seconds": tuned.training_seconds, "parameters": tuned.parameters}
    return Row(arrays, figures | costs | {"trials": _results(tuned.trials)})


def _tiger(world: World) -> Row:
    config, catalogue = world.config, world.catalogue
    with progress("  TIGER") as bar:
        tiger = tune_tiger(
            world.events,
            config.timeline,
            catalogue.semantic_ids,
            catalogue.trie,
            TIGER_TRIALS,
            config.seed,
            note=lambda line: bar.advance(note=line),
        )
    began = time.perf_counter()
    leaves, log_probs = tiger.generate(world.histories, LIST)
    speed = len(leaves) / (time.perf_counter() - began)
    arrays = {
        "leaves": leaves,
        "log_probs": log_probs,
        "candidates": tiger.score(world.histories, world.candidate_leaves),
    }
    figures = {"training_seconds": tiger.training_seconds, "parameters": tiger.parameters, "users_per_second": speed}
    return Row(arrays, figures | {"trials": _results(tiger.trials)})


def _policy(run: Artefacts, name: str, group: str, other: Artefacts, folder: str) -> SystemSpec:
    artefact = _plan(run, "policy", {"folder": folder}, {"policy": other["policy"].version})
    return SystemSpec(name, group, artefact, partial(_predict, name, other, folder))


def _predict(name: str, run: Artefacts, folder: str, world: World) -> Row:
    config, trained = run.config, run["policy"]
    manifest = trained.read()
    if manifest is None:
        began = time.perf_counter()
        manifest = trained.finish(make_policy(run, trained), time.perf_counter() - began)
    with storage.local_folder(trained.path(folder)) as local:
        engine = TorchEngine.load(local, world.catalogue.trie)
    vocabulary, semantic_ids = engine.vocabulary, world.catalogue.semantic_ids
    blocks = blocks_of_prompts(config)
    prompts = build_prompts(world.events, world.anchors, semantic_ids, vocabulary, config.prompt, blocks)
    # A policy that learned rejections alone was never told what follows an ID.
    judges = config.supervised.warmup_target == "events" and config.supervised.warmup_epochs > 0
    # A policy that saw no question does not know how one is answered.
    aligned = config.supervised.alignment_epochs > 0 and manifest["figures"]["alignment_questions"] > 0
    options = _options(world, engine) if aligned else None
    parts: list[Arrays] = []
    generating = 0.0
    with progress(f"  {name}", len(prompts)) as bar:
        for start_row in range(0, len(prompts), _BLOCK):
            rows = np.arange(start_row, min(start_row + _BLOCK, len(prompts)))
            block, candidates = prompts.take(rows), world.candidate_leaves[rows]
            began = time.perf_counter()
            leaves, log_probs, verdicts = engine.generate_and_judge(block, max(LIST, config.generate.beam_width))
            generating += time.perf_counter() - began
            scores, candidate_verdicts = engine.score_and_judge(block, candidates)
            part = {"leaves": leaves, "log_probs": log_probs, "candidates": scores}
            if judges:
                part |= {"verdicts": verdicts, "candidate_verdicts": candidate_verdicts}
            if options is not None:
                part["choice"] = engine.score(options.take(rows), candidates)
            parts.append(part)
            bar.advance(len(rows))
    seconds = manifest["figures"]["training_seconds"]
    figures = {
        "training_seconds": sum(seconds.values()) if folder == "checkpoint" else seconds["supervised"],
        "parameters": manifest["figures"]["parameters"],
        "users_per_second": len(prompts) / generating,
        "alignment_accuracy": manifest["figures"]["alignment_accuracy"],
        "verdict_auc": manifest["figures"]["verdict_auc"],
        "stages": manifest["figures"]["stages"],
    }
    return Row({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, figures)


def blocks_of_prompts(config: Config) -> tuple[str, ...]:
    """History in the prompt that a policy is asked with: what its warm-up showed."""
    if config.supervised.warmup_target == "next_negative":
        return config.supervised.warmup_blocks
    return ("negatives", "positives")


def _options(world: World, engine: TorchEngine) -> Ragged:
    """The candidates listed in a question, as alignment lists four; sets with padding repeat their first candidate."""
    items = world.candidates.items
    items = np.where(items >= 0, items, np.maximum(items[:, :1], 0))
    tokens = choices(items, world.catalogue.semantic_ids, engine.vocabulary)
    return Ragged.from_lengths(tokens.ravel(), np.full(len(tokens), tokens.shape[1]))


# ---- artefacts ----


def _plan(run: Artefacts, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Artefact:
    return run.system(name, {"list": LIST, **settings}, inputs or {})


def _trials(trials: Any) -> list[dict[str, float]]:
    return [dataclasses.asdict(trial) for trial in trials]


def _results(results: Any) -> list[dict[str, float]]:
    return [
        dataclasses.asdict(result.trial)
        | {"validation_fhr": result.figure, "epochs": result.epochs, "seconds": round(result.seconds, 1)}
        for result in results
    ]


def _table(arrays: Arrays) -> pa.Table:
    columns = {}
    for name, values in arrays.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table(columns)


def _arrays(table: pa.Table) -> Arrays:
    return {
        name: table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)
        for name in table.column_names
    }
