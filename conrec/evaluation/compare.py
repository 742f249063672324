"""Systems of an evaluation beside each other: lines of what trades, catches, and paired differences.

    found = comparisons(world, table, points, lines)       # ours at the harm of every other system
    steps = ablation(world, table)

Table: id -> `Measured`, in the order in which rows are shown. Invariant: two systems are compared on the same anchors
and the same resamples of users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conrec.evaluation.baselines import EXPOSURE_LINE
from conrec.evaluation.frontier import catch_curve, catch_difference, frontier_difference
from conrec.evaluation.measured import Measured, values_of
from conrec.evaluation.metrics import SERVED_K, Figure, paired_difference, summarise
from conrec.evaluation.rows import Predictions
from conrec.evaluation.systems import ABLATION, COUNTED, FULL
from conrec.evaluation.world import World
from conrec.progress import progress

FALSE_BLOCKS = np.linspace(0.0, 0.05, 51)
SHARES = np.linspace(0.1, 1.0, 10)
"""Shares of the places of its lists that a system from outside keeps: the points of its frontier."""


def lines_of_all(world: World, table: Mapping[str, Measured]) -> dict[str, list[dict[str, Any]]]:
    """The frontiers of systems that are not ours: of exposure times rejection rate, and of each one from outside."""
    exposure = [line_point(str(exponent), world, table[name].values) for exponent, name in enumerate(EXPOSURE_LINE)]
    by_score = {
        f"{row.name}, by score": score_line(world, row.name, row.predictions)
        for row in table.values()
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


def line_point(label: str, world: World, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """A point of a line of the frontier plot."""
    harm = {name: values[name] for name in ("FHR", "FPH")}
    figures = summarise(harm, world.anchors.users, world.config.evaluation.resamples, world.config.seed)
    return {"label": label, "FHR": figures["FHR"], "FPH": figures["FPH"]}


def catch_curves(
    world: World, table: Mapping[str, Measured], ours: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Catch by false block, each system blocking by its own score: ours, floors that count, and those from outside."""
    brought = [id for id, row in table.items() if row.group == "outside"]
    return {
        table[id].name: {
            "false_block": FALSE_BLOCKS.tolist(),
            "catch": catch_curve(*table[id].orderings[0], world.targets, FALSE_BLOCKS).tolist(),
        }
        for id in (*ours, "highest rejection rate", "most shown", *EXPOSURE_LINE, *brought)
    }


def comparisons(
    world: World,
    table: Mapping[str, Measured],
    points: Sequence[Measured],
    lines: Mapping[str, Sequence[Measured]],
) -> dict[str, dict[str, Any]]:
    """Our frontier, `points`, at the FPH of every other system, and our catch beside its catch.

    `lines`: id -> all settings of the system of which this row is one: what has settings to trade is a frontier too.
    """
    settings, users = world.config.evaluation, world.anchors.users
    found = {}
    others = {id: row for id, row in table.items() if row.group not in ("ours", "ablation") or id == COUNTED}
    with progress("  comparisons", len(others)) as bar:
        for id, other in others.items():
            at_equal_harm = frontier_difference(
                [point.values for point in points],
                [point.values for point in lines.get(id, (other,))],
                other.values,
                users,
                world.halves,
                settings.resamples,
                world.config.seed,
            )
            caught = catch_difference(
                table[FULL].orderings,
                other.orderings,
                world.targets,
                users,
                settings.resamples,
                world.config.seed,
            )
            found[other.name] = at_equal_harm | {
                "catch_difference": caught["difference"],
                "catch_ratio": caught["ratio"],
            }
            bar.advance(note=other.name)
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
    if any(id not in table for id, _ in ABLATION):
        return []
    pairs = zip(ABLATION[1:], ABLATION[:-1], strict=True)
    return [
        {"step": step, "against": table[before].name, "differences": difference(world, table, id, before)}
        for (id, step), (before, _) in pairs
    ]
