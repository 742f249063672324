"""Train stage: history and catalogue -> the policy: checkpoints, adapter, metrics, plots."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from conrec import storage
from conrec.artefact import Artefact
from conrec.config import Config, EvaluationSettings, PromptSettings, TimelineSettings
from conrec.errors import TooLittleDataError
from conrec.evaluation.leaks import check_training_anchors
from conrec.evaluation.metrics import SERVED_K, per_anchor
from conrec.feedback.anchors import Anchors, training_anchors, validation_anchors
from conrec.feedback.events import LIKED, Events
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import Targets, ground_truth_sets, targets
from conrec.policy.loop import epochs_of
from conrec.policy.model import build_model, put_tensors, read_tensors, save_checkpoint
from conrec.policy.prompts import build_prompts
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, JudgedPairs, TrainingData
from conrec.policy.supervised import batches
from conrec.policy.tasks import (
    Examples,
    Questions,
    alignment,
    alignment_questions,
    next_negative,
    translation,
    warm_up,
)
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import console, progress
from conrec.ragged import Ragged, ranges
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import make_catalogue
from conrec.stages.inputs import (
    Catalogue,
    history_items,
    leaf_items_by_rejections,
    ranked_items,
    read_events,
    rejecting_users,
    rejections_in_history,
)
from conrec.stages.new_items import load_catalogue

if TYPE_CHECKING:
    # Ray Train and matplotlib are loaded where something is trained: every night imports this module.
    from conrec.policy.workers import Inputs

HELD_OUT_QUESTIONS = 1000
"""Alignment questions that measure forgetting, at most."""


def make_policy(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves checkpoint/ (what vLLM loads), supervised/ (the policy before GRPO), adapter/ with LoRA, metrics.jsonl,
    plots.

    Trained twice: first on what lies before the validation time, where the days until the cut decide which stages of
    GRPO are accepted, and after how many steps; then the same again on everything until the cut, since the newest
    events tell the most about what comes next. Without stages there is nothing to decide; the first training then waits
    until a score is fitted. With `timeline.refit` false the first training is the policy.
    """
    from conrec.report.training_plots import plot_training

    config = run.config
    if not config.timeline.refit:
        return _served_as_validated(run, artefact)
    decided = validated(run) if config.grpo.stages else Validated([], [], 0.0)
    accepted = {row["phase"]: row["best_step"] for row in decided.stages if row["stage_accepted"]}
    stages = tuple(
        stage.model_copy(update={"steps": accepted[stage.name]})
        for stage in config.grpo.stages
        if stage.name in accepted
    )
    chosen = config.model_copy(update={"grpo": config.grpo.model_copy(update={"stages": stages})})
    world, trained, figures = train_both(run.of(chosen), artefact)
    figures["training_seconds"]["validated"] = decided.seconds
    save_policy(world.model, world.tokenizer, trained, artefact, config)
    write_rows(trained.rows, artefact)
    plot_training(decided.rows or trained.rows, artefact.path("training.png"))
    # The refit has seen what the verdict would be tried on: its twin's figures stand for it.
    return figures | {"stages": decided.stages, "verdict_auc": verdict_aucs(decided.rows)}


def _served_as_validated(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves what `make_policy` does, of the training until the validation time."""
    from conrec.report.training_plots import plot_training

    decided, first = validated(run), run["validated"]
    for name in ("supervised", "checkpoint", *(["adapter"] if run.config.lora is not None else [])):
        with storage.local_folder(first.path(name)) as folder:
            storage.upload(folder, artefact.path(name))
    write_rows(decided.rows, artefact)
    plot_training(decided.rows, artefact.path("training.png"))
    return dict(first.require()["figures"])


@dataclass(frozen=True)
class Validated:
    """What the training until the validation time found: its metrics, and what it decided over the stages."""

    rows: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    seconds: float


def validated(run: Artefacts) -> Validated:
    """Trains on what lies before the validation time, for every user, or reads what another run found.

    Leaves checkpoint/, supervised/, adapter/ with LoRA and metrics.jsonl in an artefact of its own.
    """
    artefact = run["validated"]
    if artefact.read() is None:
        began = time.perf_counter()
        make_earlier_catalogue(run)
        world, trained, figures = train_both(run.earlier, artefact, run.config.timeline)
        save_policy(world.model, world.tokenizer, trained, artefact, run.config)
        write_rows(trained.rows, artefact)
        figures["stages"] = [row for row in trained.rows if "stage_accepted" in row]
        artefact.finish(figures, time.perf_counter() - began)
        for row in figures["stages"]:
            verdict = "accepted" if row["stage_accepted"] else "rejected, its weights are dropped"
            if "lift_ratio" in row:
                verdict += f": Lift {row['lift_ratio']:.2f} times, by chance in {row['lift_chance']:.1%} of cases"
            else:
                verdict += ": validation did not improve"
            console.print(
                f"  GRPO stage {row['phase']}: {verdict}; validation FHR {row['before_fhr']:.3f} -> "
                f"{row['after_fhr']:.3f}, FPH {row['before_fph']:.3f} -> {row['after_fph']:.3f}"
            )
    figures = artefact.require()["figures"]
    seconds = sum(figures["training_seconds"].values())
    return Validated(read_rows(artefact), figures["stages"], seconds)


def make_earlier_catalogue(run: Artefacts) -> None:
    """Fits the catalogue of the validation time, unless one is finished."""
    began, artefact = time.perf_counter(), run.earlier["catalogue"]
    if artefact.read() is None:
        artefact.finish(make_catalogue(run.earlier, artefact), time.perf_counter() - began)


@dataclass(frozen=True)
class Trained:
    """Rows of metrics, and the trained tensors before and after GRPO."""

    rows: list[dict[str, Any]]
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


def train_both(
    run: Artefacts, artefact: Artefact, decided_by: TimelineSettings | None = None
) -> tuple[TrainingWorld, Trained, dict[str, Any]]:
    """The supervised phases, unless a run with other GRPO settings left them, then the stages of GRPO.

    `decided_by`: the timeline whose validation anchors decide over the stages; they lie at the cut of `run`.
    """
    start = run["supervised"]
    world = TrainingWorld.load(run, decided_by)
    # Before the supervised phases: a stage without samples is told at once.
    stages, figures = grpo_stages(run.config, world)
    tasks = {} if start.read() else supervised_tasks(run.config, world)
    url = storage.absolute(start.path("policy.safetensors"))
    trained = Phases([], {}, 0.0, 0.0)
    if tasks or stages:
        trained = run_phases(run, artefact, world, world.data(tasks, stages), url)
    if tasks:
        rows = [row for row in trained.rows if row["phase"] in tasks]
        start.finish(left_supervised(start, tasks, rows), trained.supervised_seconds)
    initial = read_tensors(url)
    rows = read_rows(start) + [row for row in trained.rows if row["phase"] in stages]
    figures |= {
        "alignment_accuracy": forgetting(rows),
        "verdict_auc": verdict_aucs(rows),
        "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        "training_seconds": {
            "supervised": start.require()["seconds"],
            "grpo": round(trained.grpo_seconds, 1),
        },
    }
    return world, Trained(rows, initial, trained.final or initial), figures


def left_supervised(artefact: Artefact, tasks: dict[str, Examples], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Leaves metrics.jsonl beside policy.safetensors, the tensors that GRPO starts from; returns the figures."""
    write_rows(rows, artefact)
    tokens = {name: len(examples.tokens.values) for name, examples in tasks.items()}
    return {"supervised_tokens": tokens, "alignment_accuracy": forgetting(rows), "verdict_auc": verdict_aucs(rows)}


@dataclass(frozen=True)
class TrainingWorld:
    """What both halves of the training read: catalogue, events, validation anchors, and the model before training.

    `history` holds the events that may train: they end at the cut. Validation anchors, where something is decided, lie
    at it, and `events` reach to the end of their windows.
    """

    catalogue: Catalogue
    events: Events
    history: Events
    validation: Anchors
    model: Any
    tokenizer: Any
    vocabulary: Vocabulary
    questions: Questions
    held_out: np.ndarray
    prompts: PromptSettings

    @classmethod
    def load(cls, run: Artefacts, decided_by: TimelineSettings | None = None) -> TrainingWorld:
        """Reads the catalogue and the interactions until the cut, and builds the model.

        Where validation anchors decide, items that come after them are not known, as their events to nobody.
        """
        config = run.config
        catalogue = load_catalogue(run)
        if decided_by is None:
            events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
        else:
            events = read_events(config, catalogue.item_ids, decided_by.cut_us, max_unknown_share=1.0)
        model, tokenizer, vocabulary = build_model(config, catalogue.items["text"].to_pylist())
        validation = validation_anchors(events, decided_by or config.timeline)
        if decided_by is None:
            validation = validation.take(np.zeros(0, np.int64))
        history = events.before(config.timeline.cut_us)
        questions = alignment_questions(
            history, catalogue.semantic_ids, unit_categories(catalogue), config.supervised, config.seed
        )
        return cls(
            catalogue,
            events,
            history,
            validation,
            model,
            tokenizer,
            vocabulary,
            questions,
            held_out(questions, config),
            config.prompt,
        )

    def data(
        self, tasks: dict[str, Examples] | None = None, stages: dict[str, GrpoSamples] | None = None
    ) -> TrainingData:
        """These tasks or samples beside the held-out questions, the validation prompts and their pairs."""
        held = np.flatnonzero(self.held_out)[:HELD_OUT_QUESTIONS]
        return TrainingData(
            tasks or {},
            stages or {},
            held_out_questions(self.questions.take(held), self.catalogue, self.vocabulary),
            build_prompts(self.events, self.validation, self.catalogue.semantic_ids, self.vocabulary, self.prompts),
            self.validation.users,
            judged_pairs(self.catalogue, self.events, self.validation),
        )


@dataclass(frozen=True)
class Phases:
    """Rows of metrics of what was trained, the trained tensors at its end, and the seconds of both kinds of phases."""

    rows: list[dict[str, Any]]
    final: dict[str, torch.Tensor]
    supervised_seconds: float
    grpo_seconds: float


def run_phases(run: Artefacts, artefact: Artefact, world: TrainingWorld, data: TrainingData, start_url: str) -> Phases:
    """Trains what `data` holds in one run of Ray Train. `start_url`: see `Inputs`."""
    from conrec.policy.workers import Inputs

    config = run.config
    data.save(artefact.path("inputs"))
    # Workers start in folders of their own.
    codebook_url = storage.absolute(run["catalogue"].path("codebook.safetensors"))
    inputs = Inputs(
        config,
        world.catalogue.items["text"].to_pylist(),
        world.catalogue.trie,
        codebook_url,
        storage.absolute(artefact.path("inputs")),
        start_url,
    )
    # What is resumed has the same phases: another run may have left the supervised ones in the meantime.
    folders = ("ray", "ray-grpo")
    url = artefact.path(folders[0] if data.tasks else folders[1])
    phases = fit_with_progress(config, inputs, ValidationMeasure.of(config, world), data, url)
    # What only a resumed run needs; the artefact is complete without it.
    for part in (*folders, "inputs"):
        storage.remove(artefact.path(part))
    return phases


def write_rows(rows: list[dict[str, Any]], artefact: Artefact) -> None:
    """Leaves metrics.jsonl."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(artefact.path("metrics.jsonl"), lines.encode())


def read_rows(artefact: Artefact) -> list[dict[str, Any]]:
    """Reads metrics.jsonl."""
    return [json.loads(line) for line in storage.read_bytes(artefact.path("metrics.jsonl")).splitlines()]


def forgetting(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy on the held-out alignment questions after each phase that measured it."""
    return {row["phase"]: row["alignment_accuracy"] for row in rows if "alignment_accuracy" in row}


def verdict_aucs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """AUC of the verdict on the validation anchors' pairs after each phase that measured it."""
    return {row["phase"]: row["verdict_auc"] for row in rows if "verdict_auc" in row}


def supervised_tasks(config: Config, world: TrainingWorld) -> dict[str, Examples]:
    """Token sequences of each supervised task that has passes and examples. Raises `TooLittleDataError` for none."""
    catalogue, vocabulary = world.catalogue, world.vocabulary
    semantic_ids, texts = catalogue.semantic_ids, catalogue.items["text"].to_pylist()
    asked = world.questions.take(np.flatnonzero(~world.held_out))
    everything = {
        "translation": lambda: translation(texts, semantic_ids, world.tokenizer, vocabulary),
        "alignment": lambda: alignment(asked, semantic_ids, vocabulary),
        "warm_up": lambda: warm_up(world.history, semantic_ids, vocabulary, config.prompt.max_events, config.seed),
        "next_negative": lambda: next_rejections(config, world),
    }
    tasks = {name: everything[name]() for name in epochs_of(config)}
    tasks = {name: examples for name, examples in tasks.items() if len(examples.tokens)}
    if not tasks:
        supervised = config.supervised
        raise TooLittleDataError(
            f"nothing to train before GRPO: supervised.translation_epochs = {supervised.translation_epochs:g}, "
            f"alignment_epochs = {supervised.alignment_epochs:g} over {len(asked.answer):,} questions and "
            f"warmup_epochs = {supervised.warmup_epochs:g} over {len(world.history):,} events "
            f'(warmup_target = "{supervised.warmup_target}") make no example; give translation or events a pass'
        )
    return tasks


def next_rejections(config: Config, world: TrainingWorld) -> Examples:
    """A prompt before every rejection, the rejected item its answer."""
    every = config.timeline.model_copy(update={"max_anchors_per_user": len(world.history)})
    anchors = training_anchors(world.history, every)
    wanted = targets(world.history, anchors).next_negative
    semantic_ids, blocks = world.catalogue.semantic_ids, config.supervised.warmup_blocks
    prompts = build_prompts(world.history, anchors, semantic_ids, world.vocabulary, config.prompt, blocks)
    known = np.flatnonzero(wanted >= 0)
    return next_negative(prompts.take(known), semantic_ids[wanted[known]], world.vocabulary)


def grpo_stages(config: Config, world: TrainingWorld) -> tuple[dict[str, GrpoSamples], dict[str, Any]]:
    """The samples of each GRPO stage, and figures about what training reads.

    Raises `TooLittleDataError` for a stage without samples.
    """
    history, trie = world.history, world.catalogue.trie
    semantic_ids = world.catalogue.semantic_ids
    neighbours = swing_neighbours(history, len(semantic_ids), config.swing, config.seed)
    anchors = training_anchors(history, config.timeline)
    check_training_anchors(history, anchors, config.timeline.cut_us)
    wanted = targets(history, anchors)
    if config.grpo.targets == "next_negative":
        known = wanted.next_negative >= 0
        truth = Ragged.from_lengths(wanted.next_negative[known], known.astype(np.int64))
        weights = np.ones(len(truth.values))
    else:
        truth, weights = ground_truth_sets(wanted, neighbours, config.grpo.kappa)
    # Without a future rejection there is nothing to reward.
    rejecting = wanted.future_negatives.lengths > 0
    truth_leaves = Ragged(trie.item_leaves[truth.values], truth.offsets)
    positive_leaves = Ragged(trie.item_leaves[wanted.future_positives.values], wanted.future_positives.offsets)
    stages = {}
    for stage in config.grpo.stages:
        prompts = build_prompts(history, anchors, semantic_ids, world.vocabulary, config.prompt, stage.blocks)
        samples = GrpoSamples(prompts, truth_leaves, weights.astype(np.float32), positive_leaves)
        # A user without events of the stage's blocks has nothing that an ID could be predicted from.
        informative = np.bincount(prompts.rows, prompts.values != world.vocabulary.begin, len(prompts)) > 0
        chosen = np.flatnonzero(informative & rejecting)
        if not len(chosen):
            raise TooLittleDataError(
                f"GRPO stage {stage.name!r} has nothing to learn from: of {len(anchors):,} training anchors "
                f"{np.count_nonzero(rejecting):,} have a rejection in their window, {np.count_nonzero(informative):,} "
                f"a history of the blocks {', '.join(stage.blocks)}, none both; leave the stage out of grpo.stages"
            )
        stages[stage.name] = samples.take(chosen)
    return stages, {
        "training_anchors": int(rejecting.sum()),
        "validation_anchors": len(world.validation),
        "swing_covered_share": neighbours.covered_share,
        "alignment_questions": len(world.questions.answer),
    }


def unit_categories(catalogue: Catalogue) -> np.ndarray:
    """Category numbers, one for all where the catalogue has none."""
    categories = catalogue.categories
    return np.zeros(len(catalogue.semantic_ids), np.int64) if categories is None else categories


def held_out(questions: Questions, config: Config) -> np.ndarray:
    """Which questions train nothing: those of a share of the users. Shape: (Q,) bool."""
    users = np.unique(questions.users)
    chosen = np.random.default_rng(config.seed).random(len(users)) < config.supervised.alignment_holdout
    return chosen[np.searchsorted(users, questions.users)]


def held_out_questions(questions: Questions, catalogue: Catalogue, vocabulary: Vocabulary) -> HeldOutQuestions:
    """The questions as prompts with four leaves to choose from."""
    examples = alignment(questions, catalogue.semantic_ids, vocabulary)
    count = len(questions.answer)
    width = len(examples.tokens.values) // count if count else 1
    tokens = examples.tokens.values.reshape(count, width)[:, : width - vocabulary.levels]
    prompts = Ragged.from_lengths(tokens.ravel(), np.full(count, tokens.shape[1]))
    return HeldOutQuestions(prompts, catalogue.trie.item_leaves[questions.options].astype(np.int64), questions.answer)


@dataclass(frozen=True)
class ValidationMeasure:
    """FHR and FPH at 20 of generated leaves on the validation anchors; sent to the training workers.

    Shape: A anchors in `targets`, `excluded` (their history) and `rejections`; leaf_items M rows.
    """

    targets: Targets
    excluded: Ragged
    rejections: np.ndarray
    item_rejections: np.ndarray
    leaf_items: Ragged
    settings: EvaluationSettings

    @classmethod
    def of(cls, config: Config, world: TrainingWorld) -> ValidationMeasure:
        """The measure of the validation anchors; what may train decides which items of a shared ID come first."""
        events, anchors = world.events, world.validation
        return cls(
            targets(events, anchors),
            history_items(events, anchors),
            rejections_in_history(events, anchors),
            rejecting_users(world.history, len(world.catalogue.semantic_ids)),
            leaf_items_by_rejections(world.catalogue.trie, world.history),
            config.evaluation,
        )

    def values(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure of every anchor for leaves (A, W), best first."""
        ranked = ranked_items(leaves, self.leaf_items, self.excluded, SERVED_K)
        return per_anchor(ranked, self.targets, self.rejections, self.item_rejections, self.settings)

    def __call__(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """What decides over a GRPO stage, by anchor."""
        values = self.values(leaves)
        return {name.lower(): values[name] for name in ("FHR", "FPH", "FRecall")}


def fit_with_progress(
    config: Config, inputs: Inputs, measure: ValidationMeasure, data: TrainingData, url: str
) -> Phases:
    """`fit` with one bar over all steps."""
    from conrec.policy.workers import fit

    total = sum(stage.steps for stage in config.grpo.stages if stage.name in data.stages)
    total += sum(
        len(batches(data.tasks[name], config.supervised.tokens_per_step, passes, config.seed))
        for name, passes in epochs_of(config).items()
        if name in data.tasks
    )
    began = supervised = time.perf_counter()
    with progress("  training" if data.tasks else "  GRPO", total) as bar:

        def show(row: dict[str, Any]) -> None:
            nonlocal supervised
            if row["phase"] in data.tasks:
                supervised = time.perf_counter()
            if "loss" in row:
                reward = f", reward {row['reward']:.4f}" if "reward" in row else ""
                bar.advance(note=f"{row['phase']}: loss {row['loss']:.3f}{reward}")

        trained = fit(inputs, measure, url, show)
    if not data.stages:
        supervised = time.perf_counter()
    return Phases(trained.rows, trained.final, supervised - began, time.perf_counter() - supervised)


def save_policy(
    model: Any,
    tokenizer: Any,
    trained: Trained,
    artefact: Artefact,
    config: Config,
) -> None:
    """Writes the policy before GRPO and the final one as plain checkpoints; leaves the final weights in `model`."""
    for name, tensors in (("supervised", trained.initial), ("checkpoint", trained.final)):
        put_tensors(model, tensors)
        upload_folder(lambda folder: save_checkpoint(model, tokenizer, folder), artefact.path(name))
    if config.lora is not None:
        upload_folder(lambda folder: model.save_pretrained(folder, safe_serialization=True), artefact.path("adapter"))


def upload_folder(write: Callable[[Path], None], url: str) -> None:
    """Writes files to a local folder, then moves them to any store."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        storage.upload(folder, url)


def judged_pairs(catalogue: Catalogue, events: Events, anchors: Anchors) -> JudgedPairs:
    """What each anchor rejects or likes in its window and has not met before, less what it does both to.

    Items without a semantic ID of the trie are left out. Shape: A anchors -> A rows of leaves.
    """
    item_count = len(catalogue.semantic_ids)
    wanted = targets(events, anchors)
    known, rejected, liked = (
        part.rows.astype(np.int64) * item_count + part.values
        for part in (history_items(events, anchors), wanted.future_negatives, wanted.future_positives)
    )
    told = np.setdiff1d(np.setxor1d(rejected, liked), known)
    anchor, item = np.divmod(told, item_count)
    leaves = catalogue.trie.item_leaves[item].astype(np.int64)
    live = leaves >= 0
    return JudgedPairs(
        Ragged.from_rows(anchor[live], leaves[live], len(anchors)), np.isin(told[live], rejected, assume_unique=True)
    )


def liked_leaves(catalogue: Catalogue, events: Events, anchors: Anchors) -> Ragged:
    """Semantic IDs (leaves) of what each anchor's user has liked up to it: never generated."""
    lengths = anchors.ends - anchors.starts
    position = ranges(anchors.starts, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    leaves = catalogue.trie.item_leaves[events.items[position]]
    kept = (events.kinds[position] == LIKED) & (leaves >= 0)  # what disappeared cannot be generated anyway
    return Ragged.from_rows(row[kept], leaves[kept], len(lengths))
