"""Evaluate stage: the method beside what it must beat, on anchors that training never saw.

Every system leaves a row of predictions (`conrec.stages.systems`); here they are measured, on the same anchors, and
compared. The full method is a frontier: the exponent of the rejection odds, and gamma in the reward where the ablation
has a policy without penalty, trade rejections caught for likes lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.generate import TorchEngine, rank
from conrec.blocklist.resolve import largest_similarities, leaf_vectors
from conrec.config import GenerateSettings
from conrec.evaluation.baselines import EXPOSURE_LINE
from conrec.evaluation.candidates import accuracy, served_scores
from conrec.evaluation.curves import activity_labels, coverage_promise, item_labels, theta_curves
from conrec.evaluation.frontier import (
    by_rank,
    catch_at_false_block,
    catch_curve,
    catch_difference,
    frontier_difference,
)
from conrec.evaluation.metrics import Figure, paired_difference, per_anchor, summarise
from conrec.evaluation.report import Evaluation, System, write_report
from conrec.evaluation.responsiveness import responsiveness
from conrec.evaluation.target_coverage import target_coverage
from conrec.feedback.anchors import Anchors, Events
from conrec.feedback.swing import swing_neighbours
from conrec.policy.prompts import build_prompts
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.calibration import calibration
from conrec.stages.inputs import (
    history_items,
    ranked_items,
    rejections_in_history,
    without_padding,
)
from conrec.stages.systems import (
    ABLATION,
    AFTER,
    BEFORE,
    COUNTED,
    FULL,
    UNPUNISHED,
    Predictions,
    Row,
    World,
    floor_rows,
    served,
    systems,
)
from conrec.stages.train import SERVED_K, liked_leaves, read_rows

ODDS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
"""Exponents of the rejection odds: the points of the full method's frontier."""
CAREFUL_ODDS = 4.0
"""The exponent for a list that may cost 1 % of the likes: the catch there was largest with it at the validation cut."""
CAREFUL = f"CoNRec, rejection_odds = {CAREFUL_ODDS:g}"
THETAS = np.linspace(0.0, 1.0, 101)
FALSE_BLOCKS = np.linspace(0.0, 0.05, 51)
PLAIN = {"rejection_odds": 0.0, "freshness": 0.0, "exposure": 0.0}
"""Scoring by the policy alone: how systems are compared that differ in training."""


def make_evaluation(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves metrics.json, report.html and table.md."""
    evaluation = evaluate(run)
    write_report(
        artefact.url,
        dataclasses.replace(
            evaluation,
            quality=storage.read_json(run["catalogue"].path("quality.json")),
            training=read_rows(run["policy"]),
        ),
    )
    return {"systems": list(evaluation.systems)}


@dataclass(frozen=True)
class Measured:
    """One row of the table. `orderings` are what a threshold for all users may choose from."""

    group: str
    values: dict[str, np.ndarray]
    predictions: Predictions
    figures: Mapping[str, Any]
    served_leaves: Ragged

    @property
    def orderings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By score, and by place in the list, whichever catches more."""
        items = self.predictions.items
        return [(items, self.predictions.scores), (items, by_rank(items))]


def evaluate(run: Artefacts) -> Evaluation:
    """Every figure of every system, the comparisons at equal harm, and what the served blocklists promise."""
    config, world = run.config, World.load(run)
    rows: dict[str, tuple[str, Row]] = {}
    for spec in systems(run):
        row = spec.row(world)
        found = floor_rows(row) if spec.name == "floors" else {spec.name: row}
        rows |= {name: (spec.group, one) for name, one in found.items()}
    vectors = leaf_vectors(world.catalogue.codebook, world.catalogue.trie)
    plain = config.generate.model_copy(update=PLAIN)
    table = {
        name: measure(world, group, row, config.generate if name in (FULL, COUNTED) else plain)
        for name, (group, row) in rows.items()
    }
    full = rows[FULL][1]
    points = frontier(world, full)
    unpunished = frontier(world, rows[UNPUNISHED][1]) if UNPUNISHED in rows else {}
    table[CAREFUL] = points[CAREFUL_ODDS]
    lines = {
        "CoNRec, by rejection odds": [line_point(f"{odds:g}", world, row.values) for odds, row in points.items()],
        "exposure x rejection rate": [
            line_point(str(exponent), world, table[name].values) for exponent, name in enumerate(EXPOSURE_LINE)
        ],
    }
    if unpunished:
        lines["CoNRec with gamma = 0"] = [
            line_point(f"{odds:g}", world, row.values) for odds, row in unpunished.items()
        ]
    leaves = served(world, full, config.generate)[0][:, : config.generate.k]
    # Fair to what learned less from counts: the other policies with the same factors; and what GRPO adds beside them.
    counted = {
        f"{name}, counted factors added": measure(world, "generative", row, config.generate)
        for name, (group, row) in rows.items()
        if group == "generative" or name == BEFORE
    }
    return Evaluation(
        about=about(world),
        systems={name: system(world, row, vectors) for name, row in table.items()},
        ours=FULL,
        lines=lines,
        catch_curves={
            name: {
                "false_block": FALSE_BLOCKS.tolist(),
                "catch": catch_curve(*table[name].orderings[0], world.wanted, FALSE_BLOCKS).tolist(),
            }
            for name in (FULL, CAREFUL, BEFORE, "highest rejection rate", "most shown", *EXPOSURE_LINE)
        },
        comparisons=comparisons(world, table | counted, [table[FULL], *points.values(), *unpunished.values()]),
        ablation=ablation(world, table),
        differences={f"{AFTER} - {BEFORE}": difference(world, table, AFTER, BEFORE)},
        theta=theta(world, leaves, vectors),
        target_coverage=coverage(world),
        responsiveness=answers(world),
        forgetting={
            name: row.figures["alignment_accuracy"]
            for name, (_, row) in rows.items()
            if row.figures.get("alignment_accuracy")
        },
        verdict_auc={
            name: row.figures["verdict_auc"] for name, (_, row) in rows.items() if row.figures.get("verdict_auc")
        },
    )


def about(world: World) -> dict[str, Any]:
    """Facts above the table."""
    return {
        "cut": world.config.timeline.cut.isoformat(),
        "anchors": len(world.anchors),
        "users": len(np.unique(world.anchors.users)),
        "K": SERVED_K,
        "excluded": "every item of the user's history",
        "candidates": "1 future rejection among 20 items shown the same day, drawn by exposure",
    }


def measure(world: World, group: str, row: Row, settings: GenerateSettings) -> Measured:
    """Measures of a row; the leaves of a policy are ordered by `settings`."""
    if "leaves" in row.arrays:
        leaves, predictions = served(world, row, settings)
        generated = without_padding(leaves[:, : settings.k])
    else:
        predictions = Predictions(row.arrays["items"], row.arrays["scores"], row.arrays["candidates"])
        top = predictions.items[:, :SERVED_K]
        generated = without_padding(np.where(top >= 0, world.catalogue.trie.item_leaves[top], -1))
    values = values_of(world, predictions)
    values["likelihood"] = accuracy(predictions.candidates, world.candidates)
    if "choice" in row.arrays:
        values["choice"] = accuracy(row.arrays["choice"], world.candidates)
    return Measured(group, values, predictions, row.figures, generated)


def frontier(world: World, row: Row) -> dict[float, Measured]:
    """A policy with everything that is counted, at each exponent of the rejection odds."""
    settings = world.config.generate
    return {odds: measure(world, "ours", row, settings.model_copy(update={"rejection_odds": odds})) for odds in ODDS}


def values_of(world: World, predictions: Predictions) -> dict[str, np.ndarray]:
    """The measures at 20 items."""
    ranked = predictions.items[:, :SERVED_K]
    settings = world.config.evaluation
    return per_anchor(ranked, world.wanted, world.rejections, world.item_rejections, settings)


def system(world: World, measured: Measured, vectors: np.ndarray) -> System:
    """The row of the table: figures with intervals, and costs."""
    settings, users = world.config.evaluation, world.anchors.users
    similarities = served_scores(measured.served_leaves, world.candidates, world.catalogue.trie.item_leaves, vectors)
    values = measured.values | {"served": accuracy(similarities, world.candidates)}
    figures = summarise(values, users, settings.resamples, world.config.seed)
    caught = [
        catch_at_false_block(*ordering, world.wanted, users, settings.resamples, world.config.seed)
        for ordering in measured.orderings
    ]
    costs = {name: measured.figures.get(name) for name in ("training_seconds", "parameters", "users_per_second")}
    note = trial_note(measured.figures.get("trials", ()))
    best = max(caught, key=lambda figure: figure["value"])
    return System(measured.group, figures | {"catch at 1 %": best}, **costs, note=note)  # type: ignore[arg-type]


def trial_note(trials: Sequence[Mapping[str, float]]) -> str:
    """What a system was chosen from: its trials with their FHR@20 on the validation anchors."""
    listed = [
        f"{trial['hidden']} wide at {trial['learning_rate']:g}: {trial['validation_fhr']:.3f}" for trial in trials
    ]
    return f"chosen by validation FHR@20 among {'; '.join(listed)}" if listed else ""


def line_point(label: str, world: World, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """A point of a line of the frontier plot."""
    harm = {name: values[name] for name in ("FHR", "FPH")}
    figures = summarise(harm, world.anchors.users, world.config.evaluation.resamples, world.config.seed)
    return {"label": label, "FHR": figures["FHR"], "FPH": figures["FPH"]}


def comparisons(world: World, table: Mapping[str, Measured], points: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Our frontier, `points`, at the FPH of every other system, and our catch beside its catch."""
    settings, users = world.config.evaluation, world.anchors.users
    found = {}
    others = [name for name, row in table.items() if row.group not in ("ours", "ablation") or name == COUNTED]
    with progress("  comparisons", len(others)) as bar:
        for name in others:
            at_equal_harm = frontier_difference(
                [point.values for point in points], table[name].values, users, settings.resamples, world.config.seed
            )
            caught = catch_difference(
                table[CAREFUL].orderings,
                table[name].orderings,
                world.wanted,
                users,
                settings.resamples,
                world.config.seed,
            )
            found[name] = at_equal_harm | {
                "catch_difference": caught["difference"],
                "catch_ratio": caught["ratio"],
            }
            bar.advance(note=name)
    return found


def difference(world: World, table: Mapping[str, Measured], ours: str, theirs: str) -> dict[str, Figure]:
    """Paired difference of the measures that both define."""
    mine, other = table[ours].values, table[theirs].values
    both = [name for name in mine if name in other]
    return paired_difference(
        {name: mine[name] for name in both},
        {name: other[name] for name in both},
        world.anchors.users,
        world.config.evaluation.resamples,
        world.config.seed,
    )


def ablation(world: World, table: Mapping[str, Measured]) -> list[dict[str, Any]]:
    """Each step of the method against the row before it; empty where the rows were not asked for."""
    if any(name not in table for name, _ in ABLATION):
        return []
    pairs = zip(ABLATION[1:], ABLATION[:-1], strict=True)
    return [
        {"step": step, "against": before, "differences": difference(world, table, name, before)}
        for (name, step), (before, _) in pairs
    ]


def theta(world: World, leaves: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
    """Curves over theta by stratum, the calibrated theta, and whether it keeps its promise on other users."""
    config, trie = world.config, world.catalogue.trie
    calibrated = calibration(world.run)
    generated = without_padding(leaves)
    positives, negatives = (
        Ragged(largest_similarities(generated, items, trie, vectors)[0], items.offsets)
        for items in (world.wanted.future_positives, world.wanted.future_negatives)
    )
    rejections = rejections_in_history(world.events, world.anchors)
    borders = calibrated.strata[1:]
    everyone = {"all": np.ones(len(rejections), bool)}
    strata = activity_labels(rejections, [stratum.min_rejections for stratum in borders])
    items = item_labels(world.wanted, world.item_rejections, config.evaluation.long_tail_item)
    return {
        "alpha": calibrated.alpha,
        "calibration": calibrated.to_json(),
        "curves": theta_curves(positives, negatives, THETAS, everyone | strata | items),
        "promise": coverage_promise(positives, rejections, config.calibration, world.anchors.users, seed=config.seed),
    }


def coverage(world: World) -> dict[str, Any]:
    """How often each training target holds one of the user's strongest negative interests."""
    config, first = world.config, world.catalogue.semantic_ids[:, 0]
    neighbours = swing_neighbours(world.past, len(first), config.swing, config.seed)
    return target_coverage(
        world.events, world.anchors, neighbours, first, resamples=config.evaluation.resamples, seed=config.seed
    )


def answers(world: World) -> dict[str, Any]:
    """Responsiveness of what is served to one more rejection, and to one more like."""
    config, catalogue = world.config, world.catalogue
    with storage.local_folder(world.run["policy"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, catalogue.trie)
    prior = world.prior(config.generate)

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        prompts = build_prompts(events, anchors, catalogue.semantic_ids, engine.vocabulary, config.prompt)
        liked = liked_leaves(catalogue, events, anchors)
        leaves, _ = rank(engine, prompts, liked, catalogue.trie, prior, config.generate, engine.vocabulary)
        return ranked_items(leaves, world.leaf_items, history_items(events, anchors), SERVED_K)

    sample = min(config.evaluation.responsiveness_anchors, len(world.anchors))
    with progress("  responsiveness"):
        return responsiveness(
            serve,
            world.events,
            world.anchors,
            world.wanted,
            catalogue.semantic_ids[:, 0],
            catalogue.categories,
            sample,
            config.seed,
            resamples=config.evaluation.resamples,
        )
