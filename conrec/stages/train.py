"""Train stage: history and catalogue -> the policy: checkpoints, adapter, metrics, plots, the calibration of theta."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.calibrate import Calibration, calibrate
from conrec.blocklist.generate import TorchEngine, rank
from conrec.blocklist.resolve import largest_similarities, leaf_vectors
from conrec.config import Config, EvaluationSettings
from conrec.evaluation.metrics import per_anchor
from conrec.evaluation.plots import plot_training
from conrec.feedback.anchors import (
    LIKED,
    Anchors,
    Events,
    Targets,
    ground_truth_sets,
    targets,
    training_anchors,
    training_events,
    validation_anchors,
)
from conrec.feedback.swing import swing_neighbours
from conrec.policy.loop import epochs_of
from conrec.policy.model import build_model, save_checkpoint, trainable
from conrec.policy.prompts import build_prompts
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, TrainingData
from conrec.policy.supervised import batches
from conrec.policy.tasks import Examples, Questions, alignment, alignment_questions, translation, warm_up
from conrec.policy.training import Inputs, TrainedPolicy, fit
from conrec.policy.vocabulary import Vocabulary
from conrec.progress import console, progress
from conrec.ragged import Ragged, ranges
from conrec.stages.inputs import (
    Catalogue,
    catalogue_artefact,
    history_items,
    leaf_items_by_rejections,
    ranked_items,
    read_events,
    rejecting_users,
    rejections_in_history,
    without_padding,
)

SERVED_K = 20
"""Rank at which the measures of the published figures are taken."""


def make_policy(config: Config, artefact: Artefact) -> dict[str, Any]:
    """Leaves checkpoint/ (what vLLM loads), supervised/ (the policy before GRPO), adapter/ with LoRA, metrics.jsonl,
    plots, calibration.json."""
    catalogue = Catalogue.load(config)
    events = read_events(config, catalogue.item_ids)
    texts = catalogue.items["text"].to_pylist()
    model, tokenizer, vocabulary = build_model(config, texts)
    history = training_events(events, config.timeline)
    validation = validation_anchors(events, config.timeline)
    data, figures = training_data(config, catalogue, history, events, validation, tokenizer, vocabulary)
    data.save(artefact.path("inputs"))
    measure = ValidationMeasure.of(config, catalogue, events, history, validation)
    # Workers start in folders of their own.
    codebook_url = storage.absolute(catalogue_artefact(config).path("codebook.safetensors"))
    inputs = Inputs(config, texts, catalogue.trie, codebook_url, storage.absolute(artefact.path("inputs")))
    trained = fit_with_progress(config, inputs, measure, data, artefact.path("ray"))
    save_policy(model, tokenizer, trained, artefact, config)
    calibration = calibrate_policy(config, model, catalogue, events, validation, vocabulary)
    storage.write_json(artefact.path("calibration.json"), calibration.to_json())
    storage.write_bytes(
        artefact.path("metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in trained.rows).encode()
    )
    plot_training(trained.rows, artefact.path("training.png"))
    # What only a resumed run needs; the artefact is complete without it.
    for part in ("ray", "inputs"):
        storage.remove(artefact.path(part))
    figures |= {
        "stages": [row for row in trained.rows if "stage_accepted" in row],
        "alignment_accuracy": {
            row["phase"]: row["alignment_accuracy"] for row in trained.rows if "alignment_accuracy" in row
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "theta": calibration.overall.theta,
    }
    for row in figures["stages"]:
        verdict = (
            "accepted" if row["stage_accepted"] else "rejected: validation did not improve, its weights are dropped"
        )
        console.print(
            f"  GRPO stage {row['phase']}: {verdict}; validation FHR {row['before_fhr']:.3f} -> "
            f"{row['after_fhr']:.3f}, FPH {row['before_fph']:.3f} -> {row['after_fph']:.3f}"
        )
    return figures


def training_data(
    config: Config,
    catalogue: Catalogue,
    history: Events,
    events: Events,
    validation: Anchors,
    tokenizer: Any,
    vocabulary: Vocabulary,
) -> tuple[TrainingData, dict[str, Any]]:
    """Everything that training reads, and figures about it. `history` ends at the cut, for validation users earlier."""
    semantic_ids, trie = catalogue.semantic_ids, catalogue.trie
    neighbours = swing_neighbours(history, len(semantic_ids), config.swing, config.seed)
    anchors = training_anchors(history, config.timeline)
    wanted = targets(history, anchors)
    truth, weights = ground_truth_sets(wanted, neighbours, config.grpo.kappa)
    # Without a future rejection there is nothing to reward.
    rejecting = wanted.future_negatives.lengths > 0
    truth_leaves = Ragged(trie.item_leaves[truth.values], truth.offsets)
    positive_leaves = Ragged(trie.item_leaves[wanted.future_positives.values], wanted.future_positives.offsets)
    stages = {}
    for stage in config.grpo.stages:
        prompts = build_prompts(history, anchors, semantic_ids, vocabulary, config.prompt, stage.blocks)
        samples = GrpoSamples(prompts, truth_leaves, weights.astype(np.float32), positive_leaves)
        # A user without events of the stage's blocks has nothing that the question could be answered from.
        informative = np.bincount(prompts.rows, prompts.values != vocabulary.begin, len(prompts)) > 1
        stages[stage.name] = samples.take(np.flatnonzero(informative & rejecting))
    questions = alignment_questions(history, semantic_ids, unit_categories(catalogue), config.supervised, config.seed)
    held = held_out(questions, config)
    everything = {
        "translation": lambda: translation(catalogue.items["text"].to_pylist(), semantic_ids, tokenizer, vocabulary),
        "alignment": lambda: alignment(questions.take(np.flatnonzero(~held)), semantic_ids, vocabulary),
        "warm_up": lambda: warm_up(history, semantic_ids, vocabulary, config.prompt.max_events, config.seed),
    }
    tasks: dict[str, Examples] = {name: everything[name]() for name in epochs_of(config)}
    data = TrainingData(
        tasks,
        stages,
        held_out_questions(questions.take(np.flatnonzero(held)[:1000]), catalogue, vocabulary),
        build_prompts(events, validation, semantic_ids, vocabulary, config.prompt),
    )
    figures = {
        "training_anchors": int(rejecting.sum()),
        "validation_anchors": len(validation),
        "swing_covered_share": neighbours.covered_share,
        "alignment_questions": len(questions.answer),
        "supervised_tokens": {name: len(examples.tokens.values) for name, examples in tasks.items()},
    }
    return data, figures


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
    def of(
        cls, config: Config, catalogue: Catalogue, events: Events, history: Events, anchors: Anchors
    ) -> ValidationMeasure:
        """The measure of these anchors; `history` decides which items of a shared ID come first."""
        return cls(
            targets(events, anchors),
            history_items(events, anchors),
            rejections_in_history(events, anchors),
            rejecting_users(history, len(catalogue.semantic_ids)),
            leaf_items_by_rejections(catalogue.trie, history),
            config.evaluation,
        )

    def values(self, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """Every measure of every anchor for leaves (A, W), best first."""
        ranked = ranked_items(leaves, self.leaf_items, self.excluded, SERVED_K)
        return per_anchor(ranked, self.targets, self.rejections, self.item_rejections, self.settings)

    def __call__(self, leaves: np.ndarray, log_probs: np.ndarray) -> dict[str, float]:
        """The means that decide over a GRPO stage."""
        values = self.values(leaves)
        return {name.lower(): float(np.nanmean(values[name])) for name in ("FHR", "FPH", "FRecall")}


def fit_with_progress(
    config: Config, inputs: Inputs, measure: ValidationMeasure, data: TrainingData, url: str
) -> TrainedPolicy:
    """`fit` with one bar over all steps."""
    epochs = epochs_of(config)
    total = sum(stage.steps for stage in config.grpo.stages)
    total += sum(
        len(batches(data.tasks[name], config.supervised.tokens_per_step, passes, config.seed))
        for name, passes in epochs.items()
    )
    with progress("  training", total) as bar:

        def show(row: dict[str, Any]) -> None:
            if "loss" in row:
                reward = f", reward {row['reward']:.4f}" if "reward" in row else ""
                bar.advance(note=f"{row['phase']}: loss {row['loss']:.3f}{reward}")

        return fit(inputs, measure, url, show)


def save_policy(model: Any, tokenizer: Any, trained: TrainedPolicy, artefact: Artefact, config: Config) -> None:
    """Writes the policy before GRPO and the final one as plain checkpoints; leaves the final weights in `model`."""
    parameters = trainable(model)
    for name, tensors in (("supervised", trained.supervised or trained.final), ("checkpoint", trained.final)):
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(tensors[key])
        upload_folder(lambda folder: save_checkpoint(model, tokenizer, folder), artefact.path(name))
    if config.lora is not None:
        upload_folder(lambda folder: model.save_pretrained(folder, safe_serialization=True), artefact.path("adapter"))


def upload_folder(write: Callable[[Path], None], url: str) -> None:
    """Writes files to a local folder, then moves them to any store."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        storage.upload(folder, url)


def calibrate_policy(
    config: Config, model: Any, catalogue: Catalogue, events: Events, anchors: Anchors, vocabulary: Vocabulary
) -> Calibration:
    """theta from the validation anchors, with what would be served for them."""
    model.eval()
    prompts = build_prompts(events, anchors, catalogue.semantic_ids, vocabulary, config.prompt)
    liked = liked_leaves(catalogue, events, anchors)
    engine = TorchEngine(model, catalogue.trie, vocabulary)
    leaves, _ = rank(engine, prompts, liked, config.generate, vocabulary)
    positives = targets(events, anchors).future_positives
    similarities, _ = largest_similarities(
        without_padding(leaves), positives, catalogue.trie, leaf_vectors(catalogue.codebook, catalogue.trie)
    )
    rejections = rejections_in_history(events, anchors)
    return calibrate(Ragged(similarities, positives.offsets), rejections, config.calibration)


def liked_leaves(catalogue: Catalogue, events: Events, anchors: Anchors) -> Ragged:
    """Semantic IDs (leaves) of what each anchor's user has liked up to it: never generated."""
    lengths = anchors.ends - anchors.starts
    position = ranges(anchors.starts, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    kept = events.kinds[position] == LIKED
    return Ragged.from_rows(row[kept], catalogue.trie.item_leaves[events.items[position[kept]]], len(lengths))
