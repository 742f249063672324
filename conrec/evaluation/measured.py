"""Systems of an evaluation measured: the figures of a row by anchor, and the row of the table that they become.

    measured = measure(world, NAMES[AFTER], "ours", row)
    system = system_of(world, measured, vectors)

Invariant: every system is measured on the same anchors, and by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from conrec.blocklist.score import Score
from conrec.catalogue.items import Catalogue
from conrec.evaluation.candidates import accuracy, served_scores
from conrec.evaluation.document import CATCH, Group, System
from conrec.evaluation.frontier import by_rank, catch_at_false_block
from conrec.evaluation.leaf_items import without_padding
from conrec.evaluation.metrics import SERVED_K, Figure, per_anchor, summarise
from conrec.evaluation.predictions import Choices, PairScores, read_predictions
from conrec.evaluation.rankings import alone, ranked
from conrec.evaluation.rows import LIST, Generated, Predictions, Row
from conrec.evaluation.tuning import TrialResult
from conrec.evaluation.world import World
from conrec.ragged import Ragged


@dataclass(frozen=True)
class Measured:
    """One row of the table. `orderings` are what a threshold for all users may choose from.

    `values`: measure -> (A,); `served_leaves`: the IDs of what is listed, None where items have none; `row`: what was
    said and what it cost, of a score without a policy its cost alone.
    """

    name: str
    group: Group
    values: dict[str, np.ndarray]
    predictions: Predictions
    served_leaves: Ragged | None
    row: Row

    @property
    def orderings(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """By score, and by place in the list, whichever catches more."""
        items = self.predictions.items
        return [(items, self.predictions.scores), (items, by_rank(items))]


@dataclass(frozen=True)
class Outside:
    """What systems from outside answer, by system: rows of lists, scores (N,) of the pairs of `world.task`, and rows of
    the table with candidate accuracy alone."""

    lists: dict[str, Row]
    told: dict[str, np.ndarray]
    chosen: dict[str, System]

    def beside(self, systems: Mapping[str, System]) -> dict[str, System]:
        """The rows of a table, those that choose behind the others from outside."""
        first = {name: system for name, system in systems.items() if system.group in ("floor", "outside")}
        return first | self.chosen | dict(systems)


def outside(world: World, predictions: Mapping[str, str]) -> Outside:
    """Reads the answers. `predictions`: name of each system -> the file of its answers."""
    lists, told, chosen = {}, {}, {}
    for name, url in predictions.items():
        answer = read_predictions(url, world.task, world.excluded, LIST)
        if isinstance(answer, PairScores):
            told[name] = answer.scores
            continue
        if isinstance(answer, Choices):
            chosen[name] = System("outside", _summary(world, {"likelihood": _picked(world, answer.scores)}))
            continue
        short = int(np.count_nonzero(answer.items[world.measured, SERVED_K - 1] < 0))
        note = f"{short:,} of {world.measured.sum():,} anchors have fewer than {SERVED_K} items" if short else None
        unknown = np.full(world.candidates.items.shape, np.nan, np.float32)
        lists[name] = Row(Predictions(answer.items, answer.scores, unknown), note=note)
    return Outside(lists, told, chosen)


def measure(world: World, name: str, group: Group, row: Row) -> Measured:
    """Measures of a system by itself; a policy by its probabilities."""
    if isinstance(row.answer, Generated):
        leaves, predictions = alone(world, row.answer)
        return _measured(world, name, group, predictions, row, without_padding(leaves[:, :SERVED_K]))
    return _measured(world, name, group, row.answer, row, _top_leaves(world, row.answer))


def frontier(
    world: World, name: str, group: Group, row: Row | None, score: Score, reaches: Sequence[float]
) -> dict[float, Measured]:
    """A score at each reach, with what a policy says or without one."""
    answer = None if row is None else row.answer
    assert not isinstance(answer, Predictions), "a score ranks semantic IDs"
    began = time.perf_counter()
    found = ranked(world, answer, score, reaches)
    speed = len(world.anchors) / (time.perf_counter() - began)
    return {
        reach: _measured(
            world,
            name,
            group,
            predictions,
            Row(predictions, users_per_second=speed) if row is None else row,
            _top_leaves(world, predictions),
        )
        for reach, predictions in found.items()
    }


def values_of(world: World, predictions: Predictions) -> dict[str, np.ndarray]:
    """The measures at 20 items."""
    ranked = predictions.items[:, :SERVED_K]
    settings = world.config.evaluation
    return per_anchor(ranked, world.targets, world.rejections, world.item_rejections, settings)


def system_of(world: World, measured: Measured, vectors: np.ndarray | None) -> System:
    """The row of the table: figures with intervals, and costs; `vectors` of the leaves, where there are any."""
    settings, users, values = world.config.evaluation, world.anchors.users, measured.values
    if vectors is not None and measured.served_leaves is not None:
        item_leaves = world.catalogue.trie.item_leaves
        similarities = served_scores(measured.served_leaves, world.candidates, item_leaves, vectors)
        values = values | {"served": _picked(world, similarities)}
    figures = _summary(world, values)
    caught = [
        catch_at_false_block(*ordering, world.targets, users, settings.resamples, world.config.seed)
        for ordering in measured.orderings
    ]
    best, row = max(caught, key=lambda figure: figure["value"]), measured.row
    note = row.note or trial_note(row.trials or ())
    costs = (row.training_seconds, row.parameters, row.users_per_second)
    return System(measured.group, figures | {CATCH: best}, *costs, note)


def trial_note(trials: Sequence[TrialResult]) -> str:
    """What a system was chosen from: its trials with their FHR@20 on the validation anchors."""
    listed = [f"{one.trial.told}: {one.figure:.3f}" for one in trials]
    return f"chosen by validation FHR@20 among {'; '.join(listed)}" if listed else ""


def _measured(
    world: World, name: str, group: Group, predictions: Predictions, row: Row, generated: Ragged | None
) -> Measured:
    values = values_of(world, predictions)
    choice = row.answer.choice if isinstance(row.answer, Generated) else None
    for measured, scores in (("likelihood", predictions.candidates), ("choice", choice)):
        if scores is not None and not np.isnan(scores).all():
            values[measured] = _picked(world, scores)
    return Measured(name, group, values, predictions, generated, row)


def _picked(world: World, scores: np.ndarray) -> np.ndarray:
    """Candidate accuracy of the anchors that are measured. Shape: scores (A, C) -> (A,)."""
    return np.where(world.measured, accuracy(scores, world.candidates), np.nan)


def _summary(world: World, values: dict[str, np.ndarray]) -> dict[str, Figure]:
    return summarise(values, world.anchors.users, world.config.evaluation.resamples, world.config.seed)


def _top_leaves(world: World, predictions: Predictions) -> Ragged | None:
    if not isinstance(world.items, Catalogue):
        return None
    top = predictions.items[:, :SERVED_K]
    return without_padding(np.where(top >= 0, world.items.trie.item_leaves[top], -1))
