"""Evaluate stage: the policy before and after GRPO beside the floors, on anchors that training never saw."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np

from conrec import storage
from conrec.artefact import Artefact, plan
from conrec.blocklist.calibrate import blocked_share
from conrec.blocklist.generate import TorchEngine, contrast
from conrec.blocklist.resolve import largest_similarities, leaf_vectors
from conrec.config import Config
from conrec.evaluation.baselines import EXPOSURE_LINE, Histories, fit_floors
from conrec.evaluation.metrics import paired_difference, per_anchor, summarise
from conrec.evaluation.report import Evaluation, write_report
from conrec.feedback.anchors import REJECTED, evaluation_anchors, targets
from conrec.feedback.swing import swing_neighbours
from conrec.policy.prompts import ask, build_prompts
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.stages.inputs import (
    Catalogue,
    catalogue_artefact,
    leaf_items_by_rejections,
    ranked_items,
    read_events,
    rejecting_users,
    train_artefact,
    without_padding,
)
from conrec.stages.train import SERVED_K, liked_leaves

CONTRASTS = (0.0, 0.5, 1.0)
"""Points of the policy's own frontier: weights of what the user would like."""
THETAS = np.linspace(0.0, 1.0, 101)


def evaluate_artefact(config: Config) -> Artefact:
    """The artefact of the evaluate stage for these settings."""
    settings = config.model_dump(
        mode="json", include={"seed", "timeline", "evaluation", "swing", "prompt", "interactions"}
    )
    settings["generate"] = config.generate.model_dump(mode="json", include={"k", "beam_width", "contrast"})
    inputs = {"policy": train_artefact(config).version, "catalogue": catalogue_artefact(config).version}
    return plan(config.root, "evaluation", settings, inputs)


def make_evaluation(config: Config, artefact: Artefact) -> dict[str, Any]:
    """Leaves metrics.json and report.html."""
    policy = train_artefact(config)
    policy.require()
    rows = [json.loads(line) for line in storage.read_bytes(policy.path("metrics.jsonl")).splitlines()]
    quality = storage.read_json(catalogue_artefact(config).path("quality.json"))
    evaluation = dataclasses.replace(evaluate(config), quality=quality, training=rows)
    write_report(artefact.url, evaluation)
    return {"systems": list(evaluation.systems)}


def evaluate(config: Config) -> Evaluation:
    """Figures of every system, differences after - before GRPO, and the curves of theta."""
    catalogue = Catalogue.load(config)
    events = read_events(config, catalogue.item_ids)
    past = events.before(config.timeline.cut_us)
    anchors = evaluation_anchors(events, config.timeline)
    if config.evaluation.max_anchors is not None and len(anchors) > config.evaluation.max_anchors:
        chosen = np.random.default_rng(config.seed).permutation(len(anchors))[: config.evaluation.max_anchors]
        anchors = anchors.take(np.sort(chosen))
    wanted = targets(events, anchors)
    histories = Histories.at(events, anchors)
    excluded = histories.distinct()
    rejections = histories.distinct((REJECTED,)).lengths
    item_rejections = rejecting_users(past, len(catalogue.semantic_ids))
    values: dict[str, dict[str, np.ndarray]] = {}

    def measure(name: str, ranked: np.ndarray) -> None:
        values[name] = per_anchor(ranked, wanted, rejections, item_rejections, config.evaluation)

    neighbours = swing_neighbours(past, len(item_rejections), config.swing, config.seed)
    floors = fit_floors(
        events, config.timeline.cut_us, len(item_rejections), catalogue.categories, neighbours, config.seed
    )
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
            measure(named(label, weight, config), ranked_items(leaves, leaf_items, excluded, SERVED_K))
            if weight == config.generate.contrast:
                served = leaves[:, : config.generate.k]

    settings = config.evaluation
    systems = {name: summarise(value, anchors.users, settings.resamples, config.seed) for name, value in values.items()}
    difference = paired_difference(
        values["after GRPO"], values["before GRPO"], anchors.users, settings.resamples, config.seed
    )
    calibration = storage.read_json(train_artefact(config).path("calibration.json"))
    ours = [name for name in systems if "GRPO" in name]
    frontiers = {"exposure x rejection rate": list(EXPOSURE_LINE)}
    for label in ("before GRPO", "after GRPO"):
        by_weight = sorted({*CONTRASTS, config.generate.contrast})
        frontiers[f"{label}, by contrast"] = [named(label, weight, config) for weight in by_weight]
    return Evaluation(
        about={
            "cut": config.timeline.cut.isoformat(),
            "anchors": len(anchors),
            "users": len(np.unique(anchors.users)),
            "K": SERVED_K,
            "excluded": "every item of the user's history",
            "users per second": {label: round(value, 1) for label, value in speed.items()},
        },
        systems=systems,
        ours=ours,
        frontiers=frontiers,
        differences={"after GRPO - before GRPO": difference},
        calibration=calibration,
        curve=curves(catalogue, served, wanted.future_positives, wanted.future_negatives),
    )


def named(label: str, weight: float, config: Config) -> str:
    """Name of a system: the contrast is named where it is not the one served."""
    return label if weight == config.generate.contrast else f"{label}, contrast {weight:g}"


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


def curves(catalogue: Catalogue, served: np.ndarray, positives: Ragged, negatives: Ragged) -> dict[str, list[float]]:
    """false_block and catch of the IDs served, over theta."""
    vectors = leaf_vectors(catalogue.codebook, catalogue.trie)
    generated = without_padding(served)
    figures = {"theta": THETAS.tolist()}
    for name, items in (("false_block", positives), ("catch", negatives)):
        similarities = largest_similarities(generated, items, catalogue.trie, vectors)[0]
        figures[name] = blocked_share(Ragged(similarities, items.offsets), THETAS).tolist()
    return figures
