"""Evaluate stage: the policy before and after GRPO beside the floors, on anchors that training never saw."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.blocklist.calibrate import Calibration, blocked_share
from conrec.blocklist.generate import TorchEngine, beams, contrast
from conrec.blocklist.resolve import largest_similarities, leaf_vectors
from conrec.config import Config
from conrec.evaluation.baselines import Histories, fit_floors
from conrec.evaluation.metrics import paired_difference, per_anchor, summarise
from conrec.evaluation.report import write_report
from conrec.feedback.anchors import REJECTED, evaluation_anchors, targets, training_events
from conrec.feedback.swing import swing_neighbours
from conrec.policy.prompts import ask, build_prompts
from conrec.progress import console, progress
from conrec.ragged import Ragged
from conrec.stages.inputs import (
    Catalogue,
    catalogue_artefact,
    history_items,
    leaf_items_by_rejections,
    ranked_items,
    read_events,
    rejections_in_history,
    train_artefact,
)
from conrec.stages.train import SERVED_K, liked_leaves

CONTRASTS = (0.0, 0.5, 1.0)
"""Points of the policy's own frontier: weights of what the user would like."""
THETAS = np.linspace(0.0, 1.0, 101)


def evaluate_artefact(config: Config) -> Artefact:
    """The artefact of the evaluate stage for these settings."""
    settings = config.model_dump(mode="json", include={"seed", "timeline", "evaluation", "swing", "prompt", "interactions"})
    settings["generate"] = config.generate.model_dump(mode="json", include={"k", "beam_width", "contrast"})
    inputs = {"policy": train_artefact(config).version, "catalogue": catalogue_artefact(config).version}
    return plan(config.root, "evaluation", settings, inputs)


def run_evaluate(config: Config) -> Artefact:
    """Leaves `evaluation/<version>/` with metrics.json and report.html."""
    artefact = evaluate_artefact(config)
    if artefact.read() is not None:
        console.print(f"evaluation {artefact.version} is complete")
        return artefact
    began = time.perf_counter()
    console.print(f"evaluation {artefact.version}")
    policy = train_artefact(config)
    policy.require()
    metrics = evaluate(config)
    rows = [json.loads(line) for line in storage.read_bytes(policy.path("metrics.jsonl")).splitlines()]
    quality = storage.read_json(catalogue_artefact(config).path("quality.json"))
    write_report(artefact.url, metrics, training=rows, quality=quality)
    artefact.finish({"systems": list(metrics["systems"])}, time.perf_counter() - began)
    return artefact


def evaluate(config: Config) -> dict[str, Any]:
    """Figures of every system, differences after - before GRPO, and the curves of theta; all JSON."""
    catalogue = Catalogue.load(config)
    events = read_events(config, catalogue.item_ids)
    past = events.before(config.timeline.cut_us)
    anchors = evaluation_anchors(events, config.timeline)
    if config.evaluation.max_anchors is not None and len(anchors) > config.evaluation.max_anchors:
        chosen = np.random.default_rng(config.seed).permutation(len(anchors))[: config.evaluation.max_anchors]
        anchors = anchors.take(np.sort(chosen))
    wanted = targets(events, anchors)
    excluded = history_items(events, anchors)
    rejections = rejections_in_history(events, anchors)
    item_rejections = np.bincount(past.items[past.kinds == REJECTED], minlength=len(catalogue.semantic_ids))
    values: dict[str, dict[str, np.ndarray]] = {}

    def measure(name: str, ranked: np.ndarray) -> None:
        values[name] = per_anchor(ranked, wanted, rejections, item_rejections, config.evaluation)

    neighbours = swing_neighbours(past, len(item_rejections), config.swing, config.seed)
    floors = fit_floors(events, config.timeline.cut_us, len(item_rejections), catalogue.categories, neighbours, config.seed)
    histories = Histories.at(events, anchors)
    with progress("  floors") as bar:
        for floor in floors:
            measure(floor.name, floor.rank(histories, excluded, SERVED_K))
            bar.advance(note=floor.name)

    leaf_items = leaf_items_by_rejections(catalogue.trie, past)
    liked = liked_leaves(catalogue, events, anchors)
    speed, served = {}, np.zeros((0, 0), np.int64)
    for label, folder in (("before GRPO", "supervised"), ("after GRPO", "checkpoint")):
        with progress(f"  policy {label}", len(anchors)) as bar:
            generating = time.perf_counter()
            ranked_leaves = generate(config, catalogue, train_artefact(config).path(folder), events, anchors, bar)
            speed[label] = len(anchors) / (time.perf_counter() - generating)
        for weight in sorted({*CONTRASTS, config.generate.contrast}):
            leaves = ranked_leaves(weight, liked)
            name = label if weight == config.generate.contrast else f"{label}, contrast {weight:g}"
            measure(name, ranked_items(leaves, leaf_items, excluded, SERVED_K))
            if weight == config.generate.contrast:
                served = leaves[:, : config.generate.k]

    settings = config.evaluation
    systems = {name: summarise(value, anchors.users, settings.resamples, config.seed) for name, value in values.items()}
    difference = paired_difference(
        values["after GRPO"], values["before GRPO"], anchors.users, settings.resamples, config.seed
    )
    calibration = storage.read_json(train_artefact(config).path("calibration.json"))
    return {
        "k": SERVED_K,
        "cut": config.timeline.cut.isoformat(),
        "anchors": len(anchors),
        "users": len(np.unique(anchors.users)),
        "contrast": config.generate.contrast,
        "systems": systems,
        "after_minus_before": difference,
        "users_per_second": speed,
        "calibration": calibration,
        "curves": curves(catalogue, served, wanted.future_positives, wanted.future_negatives, calibration),
    }


def generate(config: Config, catalogue: Catalogue, checkpoint: str, events: Any, anchors: Any, bar: Any) -> Any:
    """Beams of all anchors with one checkpoint; returns a function (contrast, liked leaves) -> ranked leaves."""
    with storage.local_folder(checkpoint) as folder:
        engine = TorchEngine.load(folder, catalogue.trie)
    vocabulary = engine.vocabulary
    prompts = build_prompts(events, anchors, catalogue.semantic_ids, vocabulary, config.prompt)
    parts = []
    for start in range(0, len(prompts), 512):
        block = prompts.take(np.arange(start, min(start + 512, len(prompts))))
        leaves, rejected = engine.generate(block, config.generate.beam_width)
        parts.append((leaves, rejected, engine.score(ask(block, vocabulary.liked), leaves)))
        bar.advance(len(block))
    leaves, rejected, as_liked = (np.concatenate(column) for column in zip(*parts, strict=True))

    def ranked(weight: float, liked: Ragged) -> np.ndarray:
        return contrast(leaves, rejected, as_liked, weight, liked)[0]

    return ranked


def curves(
    catalogue: Catalogue, served: np.ndarray, positives: Ragged, negatives: Ragged, calibration: dict[str, Any]
) -> dict[str, Any]:
    """false_block and catch over theta, and at the calibrated theta of each anchor's stratum overall."""
    vectors = leaf_vectors(catalogue.codebook, catalogue.trie)
    real = served >= 0
    generated = Ragged.from_lengths(served[real], real.sum(axis=1))
    similar = {
        name: Ragged(largest_similarities(generated, items, catalogue.trie, vectors)[0], items.offsets)
        for name, items in (("false_block", positives), ("catch", negatives))
    }
    theta = Calibration.from_json(calibration).overall.theta
    figures: dict[str, Any] = {"theta": THETAS.tolist()}
    for name, similarities in similar.items():
        figures[name] = blocked_share(similarities, THETAS).tolist()
        figures[f"{name}_at_theta"] = 0.0 if theta is None else float(blocked_share(similarities, [theta])[0])
    return figures
