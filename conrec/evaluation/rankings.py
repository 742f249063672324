"""From what a system says of semantic IDs to items and the scores that order them.

    leaves, predictions = alone(world, row.answer)                        # a policy by its probabilities
    predictions = ranked(world, row.answer, score, [1.0])[1.0]            # as the night ranks

Invariant: items of the history are never listed, and items rank as a night of the anchor's moment would rank them;
of those that tie for the last place of a list, a night takes the lower rows, this any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conrec.blocklist.ranking import Answers, Ranking
from conrec.blocklist.score import LOG_PROB, Estimate, Linear, Score
from conrec.evaluation.leaf_items import scored_items, without_liked
from conrec.evaluation.rows import LIST, Generated, Predictions
from conrec.evaluation.world import World
from conrec.progress import progress

_NEVER = -1e4
"""Exposure of what stands behind everything else."""


def alone(world: World, answer: Generated) -> tuple[np.ndarray, Predictions]:
    """A policy by its probabilities alone: its leaves (A, W), and the items and candidates that follow from them."""
    leaves = generated(world, answer)
    scores = np.where(leaves >= 0, answer.log_probs, -np.inf)
    order = np.argsort(-scores, axis=1, kind="stable")
    leaves, scores = (np.take_along_axis(values, order, axis=1) for values in (leaves, scores))
    items, values = scored_items(leaves, scores, world.leaf_items, world.shares, world.excluded, LIST)
    candidates = answer.candidates + world.shares[world.candidates.items]
    return leaves, Predictions(items, values, np.where(world.candidates.items >= 0, candidates, np.nan))


def generated(world: World, answer: Generated) -> np.ndarray:
    """The leaves that a policy generated for the anchors, -1 where the user has liked one. Shape: (A, W) int64."""
    return without_liked(answer.leaves, world.liked_leaves, len(world.catalogue.trie))


def answers_of(world: World, answer: Generated) -> Answers:
    """What a policy said for the anchors, as a night asks it; a verdict of 0 where it was not asked for one."""
    verdicts = np.zeros_like(answer.log_probs) if answer.verdicts is None else answer.verdicts
    return Answers.of_dense(generated(world, answer), answer.log_probs, verdicts)


def ranked(world: World, answer: Generated | None, score: Score, reaches: Sequence[float]) -> dict[float, Predictions]:
    """The first items by a score at each reach, as the night ranks them; without a policy, by what is counted alone."""
    anchors, item_count = world.anchors, len(world.catalogue.live)
    answers = Answers.nothing(len(anchors)) if answer is None else answers_of(world, answer)
    found = {reach: Predictions.empty(len(anchors), world.candidates.items.shape[1]) for reach in reaches}
    with progress("  ranking", len(anchors)) as bar:
        for time_us in np.unique(anchors.times):
            ranking = Ranking(world.counts(int(time_us)), score, world.catalogue.trie, world.catalogue.live)
            of_time = np.flatnonzero(anchors.times == time_us)
            for start in range(0, len(of_time), ranking.block):
                rows = of_time[start : start + ranking.block]
                parts = ranking.parts(anchors.users[rows], answers.take(rows))
                odds, exposure = (part[:, :item_count] for part in parts)
                for reach, predictions in found.items():
                    # Not squeezed into (0, 1), where those of a large reach would round to one number.
                    _fill(world, predictions, rows, odds + np.float32(reach) * exposure)
                bar.advance(len(rows))
    return found


def _fill(world: World, predictions: Predictions, rows: np.ndarray, values: np.ndarray) -> None:
    """Lists and candidates of the anchors at `rows` (B,) by values (B, I), which are overwritten."""
    candidates, met = world.candidates.items[rows], world.excluded.take(rows)
    predictions.candidates[rows] = np.where(
        candidates >= 0, np.take_along_axis(values, np.maximum(candidates, 0), axis=1), np.nan
    )
    values[met.rows, met.values] = -np.inf
    best = np.argpartition(-values, min(LIST, values.shape[1]) - 1, axis=1)[:, :LIST]
    order = np.lexsort((best, -np.take_along_axis(values, best, axis=1)), axis=1)
    best = np.take_along_axis(best, order, axis=1)
    scores, width = np.take_along_axis(values, best, axis=1), best.shape[1]
    predictions.items[rows, :width] = np.where(np.isfinite(scores), best, -1)
    predictions.scores[rows, :width] = scores


def with_odds(score: Score) -> Score:
    """Our score for a policy of other people: the counted odds, and its own probability for the exposure.

    What it did not generate stands behind all that it did, by the counted odds.
    """
    never = Linear({}, _NEVER)
    odds = score.counted.odds
    return Score(Estimate(odds, never), Estimate(odds, Linear({LOG_PROB: 1.0}, 0.0)), score.reach)
