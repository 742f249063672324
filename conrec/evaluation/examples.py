"""Three users of the published lists in words: what they rejected, what is blocked and why, what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.counts import Counts
from conrec.blocklist.ranking import Answers, Ranking, published
from conrec.blocklist.score import LOG_PROB, VERDICT, Score
from conrec.catalogue.items import item_words
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.feedback.histories import rejections_in_history

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conrec.evaluation.world import World

EXAMPLES = {"sure": 0.1, "middling": 0.5, "unsure": 0.9}
"""Users that are shown in words -> the share of the users with a list whose largest score is above theirs."""
EXAMPLE_LINES, REASONS = 5, 2
"""Rows of each part of an example, and columns that are named for an item."""
IN_WINDOW = {LIKED: "liked", REJECTED: "rejected", SHOWN: "shown"}
NOT_SHOWN = "not shown"


def examples(
    world: World,
    counts: Counts,
    score: Score,
    answers: Answers,
    calibration: Calibration,
    best: np.ndarray,
    usual: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Users of EXAMPLES: what they rejected, what their list at the served alpha holds and why, what became of it.

    Shape: answers and best (U,) of `world.served`, best: the largest score of a list, -inf where it
    holds nothing; `usual`: means of the columns over what is met.
    Nobody where no list holds anything.
    """
    anchors = world.served
    ranking = Ranking(counts, score, world.catalogue.trie, world.catalogue.live)
    thresholds = calibration.thresholds(rejections_in_history(world.events, anchors))
    listed = np.flatnonzero(best >= thresholds)
    if not len(listed):
        return []
    order = listed[np.lexsort((anchors.users[listed], -best[listed]))]
    chosen: dict[int, str] = {}
    for kind, share in EXAMPLES.items():
        chosen.setdefault(round(share * (len(order) - 1)), kind)
    found = []
    for place, kind in chosen.items():
        row = order[[place]]
        one, said = anchors.take(row), answers.take(row)
        found.append({"kind": kind} | _example(world, ranking, score, one, said, thresholds[row[0]], usual))
    return found


def _example(
    world: World,
    ranking: Ranking,
    score: Score,
    anchor: Anchors,
    answers: Answers,
    threshold: np.float32,
    usual: Mapping[str, float],
) -> dict[str, Any]:
    """One user in words; anchor and answers have one row."""
    events, config = world.events, world.config
    lists = published(ranking, events, anchor.users, answers, config.timeline.cut_us, config.guardrails)
    ((_, rows),) = lists
    held = rows.items[~rows.explicit & (rows.scores >= threshold)]
    items = held[:EXAMPLE_LINES]
    odds = ranking.parts(anchor.users, answers)[0][0, items]
    words = item_words(world.catalogue.items)
    reasons = _reasons(ranking, score, answers, int(anchor.users[0]), items, usual)
    blocked = zip(items.tolist(), odds.tolist(), reasons, _became(events, anchor, items), strict=True)
    return {
        "user": events.users[int(anchor.users[0])].as_py(),
        "rejections": int(rejections_in_history(events, anchor)[0]),
        "rejected": _rejected_words(events, anchor, words),
        "length": len(held),
        "blocked": [
            {
                "item": world.catalogue.item_ids[item].as_py(),
                "words": words[item],
                "log_odds": log_odds,
                "reasons": why,
                "window": window,
            }
            for item, log_odds, why, window in blocked
        ],
    }


def _became(events: Events, anchor: Anchors, items: np.ndarray) -> list[str]:
    """What the window shows of each item: a like, else a rejection, else that it was shown, else nothing."""
    window = slice(anchor.ends[0], anchor.window_ends[0])
    met, kinds = events.items[window], events.kinds[window]
    said = {kind: set(met[kinds == kind].tolist()) for kind in IN_WINDOW}
    return [next((word for kind, word in IN_WINDOW.items() if item in said[kind]), NOT_SHOWN) for item in items]


def _rejected_words(events: Events, anchor: Anchors, words: list[str]) -> list[dict[str, Any]]:
    """What the items are that a user rejected, the most frequent first."""
    history = slice(anchor.starts[0], anchor.ends[0])
    items = events.items[history][events.kinds[history] == REJECTED]
    counted = pa.array([words[item] for item in items], pa.string()).value_counts().to_pylist()
    counted.sort(key=lambda one: (-one["counts"], one["values"]))
    return [{"words": one["values"], "count": one["counts"]} for one in counted[:EXAMPLE_LINES]]


def _reasons(
    ranking: Ranking, score: Score, answers: Answers, user: int, items: np.ndarray, usual: Mapping[str, float]
) -> list[list[str]]:
    """Columns that raise the odds of each item the most over what is usual, the most first; `answers` has one row."""
    columns = ranking.counts.columns(np.full(len(items), user), items)
    leaves, generated = ranking.trie.item_leaves[items], answers.leaves.values
    reasons = []
    for number, leaf in enumerate(leaves):
        own = {name: float(values[number]) for name, values in columns.items()}
        place, estimate = np.flatnonzero(generated == leaf), score.counted
        if len(place) and score.judged is not None:
            estimate = score.judged
            own |= {LOG_PROB: float(answers.log_probs[place[0]]), VERDICT: float(answers.verdicts[place[0]])}
        raised = {name: weight * (own[name] - usual.get(name, 0.0)) for name, weight in estimate.odds.weights.items()}
        most = sorted((name for name in raised if raised[name] > 0), key=lambda name: -raised[name])
        reasons.append(most[:REASONS])
    return reasons
