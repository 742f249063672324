"""Evaluate stage: the method beside what it must beat, on anchors that training never saw.

Every system leaves a row of predictions (`conrec.stages.systems`); here they are measured, on the same anchors, and
compared. The full method is a frontier: the exponent of the rejection odds, and gamma in the reward where the ablation
has a policy without penalty, trade rejections caught for likes lost. Systems from outside, which leave a file of
predictions (`conrec.evaluation.predictions`), are rows like the others, and beside the floors alone need no policy.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.counts import Counts
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.ranking import Asked, Ranking, published
from conrec.blocklist.resolve import leaf_vectors
from conrec.blocklist.score import Score
from conrec.evaluation.baselines import EXPOSURE_LINE, FLOORS
from conrec.evaluation.candidates import accuracy, served_scores
from conrec.evaluation.frontier import (
    by_rank,
    catch_at_false_block,
    catch_curve,
    catch_difference,
    frontier_difference,
)
from conrec.evaluation.metrics import SERVED_K, Figure, paired_difference, per_anchor, summarise
from conrec.evaluation.predictions import PairScores, check_names, read_predictions
from conrec.evaluation.responsiveness import responsiveness
from conrec.evaluation.target_coverage import target_coverage
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import targets
from conrec.progress import progress
from conrec.ragged import Ragged
from conrec.report.report import Evaluation, System, write_report
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import Catalogue, rejections_in_history, without_padding
from conrec.stages.published import LISTS, pairs_told, published_lists
from conrec.stages.scoring import Policy, things_of
from conrec.stages.systems import (
    ABLATION,
    AFTER,
    BEFORE,
    COUNTED,
    FULL,
    LIST,
    UNPUNISHED,
    Predictions,
    Row,
    World,
    alone,
    asked_of,
    floor_rows,
    ranked,
    systems,
    with_odds,
)
from conrec.stages.train import read_rows

REACHES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
"""How much exposure counts beside the odds: the points of the full method's frontier."""
FALSE_BLOCKS = np.linspace(0.0, 0.05, 51)
SHARES = np.linspace(0.1, 1.0, 10)
"""Shares of the places of its lists that a system from outside keeps: the points of its frontier."""


def make_evaluation(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves metrics.json, report.html and table.md."""
    evaluation = evaluate(run)
    if run.config.evaluation.systems != "floors":
        evaluation = dataclasses.replace(
            evaluation,
            quality=storage.read_json(run["catalogue"].path("quality.json")),
            training=read_rows(run["policy"]),
        )
    write_report(artefact.url, evaluation)
    return {"systems": list(evaluation.systems)}


@dataclass(frozen=True)
class Measured:
    """One row of the table. `orderings` are what a threshold for all users may choose from."""

    group: str
    values: dict[str, np.ndarray]
    predictions: Predictions
    figures: Mapping[str, Any]
    served_leaves: Ragged | None
    """None where items have no semantic IDs."""

    @property
    def orderings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By score, and by place in the list, whichever catches more."""
        items = self.predictions.items
        return [(items, self.predictions.scores), (items, by_rank(items))]


def evaluate(run: Artefacts) -> Evaluation:
    """What the published lists do, every figure of every system, and the comparisons at equal harm."""
    config, specs = run.config, systems(run)
    named = (*(spec.name for spec in specs), FULL, COUNTED, *FLOORS, *LISTS)
    check_names(run.sources.predictions, named)
    world = World.load(run, encoded=config.evaluation.systems != "floors")
    lists, told = outside(world)
    rows: dict[str, tuple[str, Row]] = {}
    for spec in specs:
        row = spec.row(world)
        found = floor_rows(row) if spec.name == "floors" else {spec.name: row}
        rows |= {name: (spec.group, one) for name, one in found.items()}
        if spec.name == "floors":
            rows |= {name: ("outside", one) for name, one in lists.items()}
    table = {name: measure(world, group, row) for name, (group, row) in rows.items()}
    if config.evaluation.systems == "floors":
        return beside_floors(world, table, told)
    vectors = leaf_vectors(world.catalogue.codebook, world.catalogue.trie)
    score, served = world.scoring.score, config.score.reach
    reaches = tuple(sorted({*REACHES, served}))
    ours = frontier(world, rows[AFTER][1], score, reaches, "ours")
    table[FULL] = ours[served]
    table[COUNTED] = frontier(world, None, score, (served,), "ablation")[served]
    unpunished = frontier(world, rows[UNPUNISHED][1], score, reaches, "ours") if UNPUNISHED in rows else {}
    lines = {
        "CoNRec, by reach": [line_point(f"{reach:g}", world, row.values) for reach, row in ours.items()],
        **lines_of_all(world, table),
    }
    if unpunished:
        lines["CoNRec with gamma = 0"] = [
            line_point(f"{reach:g}", world, row.values) for reach, row in unpunished.items()
        ]
    # Fair to what learned from nothing but sequences: the other policies with our odds beside them.
    theirs = with_odds(score)
    with_ours = {
        f"{name}, our odds added": frontier(world, row, theirs, (1.0,), "generative")[1.0]
        for name, (group, row) in rows.items()
        if group == "generative" or name == BEFORE
    }
    with storage.local_folder(run["policy"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, world.catalogue.trie)
    policy = Policy(engine, world.catalogue, world.events, config)
    return Evaluation(
        about=about(world),
        published=published_lists(world, policy, tonight(world, policy, rows[AFTER][1]), told),
        systems={name: system(world, row, vectors) for name, row in table.items()},
        ours=FULL,
        lines=lines,
        catch_curves=catch_curves(world, table, (FULL, COUNTED, BEFORE)),
        comparisons=comparisons(world, table | with_ours, [*ours.values(), *unpunished.values()]),
        ablation=ablation(world, table),
        differences={f"{AFTER} - {BEFORE}": difference(world, table, AFTER, BEFORE)},
        calibration=world.scoring.calibration.to_json(),
        score=score.to_json(),
        target_coverage=coverage(world),
        responsiveness=answers(world, policy),
        forgetting={
            name: row.figures["alignment_accuracy"]
            for name, (_, row) in rows.items()
            if row.figures.get("alignment_accuracy")
        },
        verdict_auc={
            name: row.figures["verdict_auc"] for name, (_, row) in rows.items() if row.figures.get("verdict_auc")
        },
    )


def beside_floors(world: World, table: Mapping[str, Measured], told: Mapping[str, np.ndarray]) -> Evaluation:
    """What can be said without a policy: the floors and the systems from outside, these against the strongest floor."""
    strongest = EXPOSURE_LINE[1]
    return Evaluation(
        about=about(world),
        published=pairs_told(world, told),
        systems={name: system(world, row, None) for name, row in table.items()},
        lines=lines_of_all(world, table),
        catch_curves=catch_curves(world, table),
        differences={
            f"{name} - {strongest}": difference(world, table, name, strongest)
            for name, row in table.items()
            if row.group == "outside"
        },
    )


def outside(world: World) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """What systems from outside answer: rows of lists, and scores (N,) of the pairs of `world.task`, by system."""
    lists, told = {}, {}
    for name, url in world.run.sources.predictions.items():
        answer = read_predictions(url, world.task, world.excluded, LIST)
        if isinstance(answer, PairScores):
            told[name] = answer.scores
            continue
        short = int(np.count_nonzero(answer.items[world.measured, SERVED_K - 1] < 0))
        note = f"{short:,} of {world.measured.sum():,} anchors have fewer than {SERVED_K} items" if short else ""
        unknown = np.full(world.candidates.items.shape, np.nan, np.float32)
        arrays = {"items": answer.items, "scores": answer.scores, "candidates": unknown}
        lists[name] = Row(arrays, {"note": note})
    return lists, told


def lines_of_all(world: World, table: Mapping[str, Measured]) -> dict[str, list[dict[str, Any]]]:
    """The frontiers of systems that are not ours: of exposure times rejection rate, and of each one from outside."""
    exposure = [line_point(str(exponent), world, table[name].values) for exponent, name in enumerate(EXPOSURE_LINE)]
    by_score = {
        f"{name}, by score": score_line(world, name, row.predictions)
        for name, row in table.items()
        if row.group == "outside"
    }
    return {"exposure x rejection rate": exposure} | by_score


def score_line(world: World, name: str, predictions: Predictions) -> list[dict[str, Any]]:
    """The frontier of one ranking: its lists cut off at the scores above which a share of all their places lies."""
    items, scores = (part[:, :SERVED_K] for part in (predictions.items, predictions.scores))
    listed = scores[(items >= 0) & world.measured[:, None]]
    points = []
    for share in SHARES if len(listed) else ():
        limit = np.quantile(listed, 1 - share, method="lower")
        kept = dataclasses.replace(predictions, items=np.where(scores >= limit, items, -1))
        label = f"{share:.0%}" if share < 1 else name
        points.append(line_point(label, world, values_of(world, kept)))
    return points


def catch_curves(
    world: World, table: Mapping[str, Measured], ours: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Catch by false block, each system blocking by its own score: ours, floors that count, and those from outside."""
    brought = [name for name, row in table.items() if row.group == "outside"]
    return {
        name: {
            "false_block": FALSE_BLOCKS.tolist(),
            "catch": catch_curve(*table[name].orderings[0], world.wanted, FALSE_BLOCKS).tolist(),
        }
        for name in (*ours, "highest rejection rate", "most shown", *EXPOSURE_LINE, *brought)
    }


def tonight(world: World, policy: Policy, row: Row) -> Asked:
    """What the night generates for the users that it serves: in the row there are more beams where it takes few."""
    if world.config.generate.beam_width < LIST:
        return policy.generate(world.served)
    return asked_of(world, row).take(world.served_rows)


def about(world: World) -> dict[str, Any]:
    """Facts above the table."""
    return {
        "cut": world.config.timeline.cut.isoformat(),
        "anchors": int(world.measured.sum()),
        "users": len(np.unique(world.anchors.users[world.measured])),
        "served users": len(world.served),
        "K": SERVED_K,
        "excluded": "every item of the user's history",
        "candidates": "1 future rejection among 20 items shown the same day, drawn by exposure",
    }


def measure(world: World, group: str, row: Row) -> Measured:
    """Measures of a system by itself; a policy by its probabilities."""
    generated: Ragged | None
    if "leaves" in row.arrays:
        leaves, predictions = alone(world, row)
        generated = without_padding(leaves[:, :SERVED_K])
    else:
        predictions = Predictions(row.arrays["items"], row.arrays["scores"], row.arrays["candidates"])
        generated = _top_leaves(world, predictions)
    return _measured(world, group, predictions, row.figures, generated, row.arrays.get("choice"))


def frontier(
    world: World, row: Row | None, score: Score, reaches: Sequence[float], group: str
) -> dict[float, Measured]:
    """A score at each reach, with what a policy says or without one."""
    began = time.perf_counter()
    found = ranked(world, row, score, reaches)
    speed = {"users_per_second": len(world.anchors) / (time.perf_counter() - began)}
    figures, choice = (speed, None) if row is None else (row.figures, row.arrays.get("choice"))
    return {
        reach: _measured(world, group, predictions, figures, _top_leaves(world, predictions), choice)
        for reach, predictions in found.items()
    }


def _measured(
    world: World,
    group: str,
    predictions: Predictions,
    figures: Mapping[str, Any],
    generated: Ragged | None,
    choice: np.ndarray | None,
) -> Measured:
    values = values_of(world, predictions)
    for name, scores in (("likelihood", predictions.candidates), ("choice", choice)):
        if scores is not None and not np.isnan(scores).all():
            values[name] = np.where(world.measured, accuracy(scores, world.candidates), np.nan)
    return Measured(group, values, predictions, figures, generated)


def _top_leaves(world: World, predictions: Predictions) -> Ragged | None:
    if not isinstance(world.items, Catalogue):
        return None
    top = predictions.items[:, :SERVED_K]
    return without_padding(np.where(top >= 0, world.items.trie.item_leaves[top], -1))


def values_of(world: World, predictions: Predictions) -> dict[str, np.ndarray]:
    """The measures at 20 items."""
    ranked = predictions.items[:, :SERVED_K]
    settings = world.config.evaluation
    return per_anchor(ranked, world.wanted, world.rejections, world.item_rejections, settings)


def system(world: World, measured: Measured, vectors: np.ndarray | None) -> System:
    """The row of the table: figures with intervals, and costs; `vectors` of the leaves, where there are any."""
    settings, users, values = world.config.evaluation, world.anchors.users, measured.values
    if vectors is not None and measured.served_leaves is not None:
        item_leaves = world.catalogue.trie.item_leaves
        similarities = served_scores(measured.served_leaves, world.candidates, item_leaves, vectors)
        values = values | {"served": np.where(world.measured, accuracy(similarities, world.candidates), np.nan)}
    figures = summarise(values, users, settings.resamples, world.config.seed)
    caught = [
        catch_at_false_block(*ordering, world.wanted, users, settings.resamples, world.config.seed)
        for ordering in measured.orderings
    ]
    costs = {name: measured.figures.get(name) for name in ("training_seconds", "parameters", "users_per_second")}
    note = measured.figures.get("note") or trial_note(measured.figures.get("trials", ()))
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
                table[FULL].orderings,
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


def coverage(world: World) -> dict[str, Any]:
    """How often each training target holds one of the user's strongest negative interests."""
    config, first = world.config, world.catalogue.semantic_ids[:, 0]
    neighbours = swing_neighbours(world.past, len(first), config.swing, config.seed)
    return target_coverage(
        world.events, world.anchors, neighbours, first, resamples=config.evaluation.resamples, seed=config.seed
    )


def answers(world: World, policy: Policy) -> dict[str, Any]:
    """Responsiveness of the published list to one more rejection, and to one more like."""
    config, catalogue, made = world.config, world.catalogue, world.scoring
    cut_us = config.timeline.cut_us
    things = things_of(catalogue)

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        # The added events lie at the cut: of things, only what lay before counts, as in the night before.
        counts = Counts.at(events, cut_us, things, cut_us - 1)
        ranking = Ranking(counts, made.score, catalogue.trie, catalogue.live)
        thresholds = made.calibration.thresholds(rejections_in_history(events, anchors))
        asked = dataclasses.replace(policy, events=events).generate(anchors)
        parts = [np.zeros((0, 0), np.int32)]
        for places, rows in published(ranking, events, anchors.users, asked, cut_us, config.guardrails):
            kept = ~rows.explicit & (rows.scores >= thresholds[places[rows.rows]])
            parts.append(Ragged.from_rows(rows.rows[kept], rows.items[kept], len(places)).padded(-1))
        width = max(part.shape[1] for part in parts)
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=-1) for part in parts]
        return np.concatenate(wide)

    sample = min(config.evaluation.responsiveness_anchors, len(world.served))
    with progress("  responsiveness"):
        return responsiveness(
            serve,
            world.events,
            world.served,
            targets(world.events, world.served),
            catalogue.semantic_ids[:, 0],
            catalogue.categories,
            sample,
            config.seed,
            resamples=config.evaluation.resamples,
        )
