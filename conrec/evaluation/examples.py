"""Three users of the published lists in words: what they rejected, what is blocked and why, what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from conrec.blocklist.ranking import Asked, Ranking
from conrec.blocklist.score import LOG_PROB, VERDICT, Score
from conrec.feedback.anchors import LIKED, REJECTED, SHOWN, Anchors, Events

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = {"sure": 0.1, "middling": 0.5, "unsure": 0.9}
"""Users that are shown in words -> the share of the users with a list whose largest score is above theirs."""
EXAMPLE_LINES, REASONS = 5, 2
"""Rows of each part of an example, and columns that are named for an item."""
IN_WINDOW = {LIKED: "liked", REJECTED: "rejected", SHOWN: "shown"}
NOT_SHOWN = "not shown"


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
    ranking: Ranking, score: Score, asked: Asked, user: int, items: np.ndarray, usual: Mapping[str, float]
) -> list[list[str]]:
    """Columns that raise the odds of each item the most over what is usual, the most first; `asked` has one row."""
    columns = ranking.counts.columns(np.full(len(items), user), items)
    leaves, generated = ranking.trie.item_leaves[items], asked.leaves.values
    reasons = []
    for number, leaf in enumerate(leaves):
        own = {name: float(values[number]) for name, values in columns.items()}
        place, estimate = np.flatnonzero(generated == leaf), score.counted
        if len(place) and score.judged is not None:
            estimate = score.judged
            own |= {LOG_PROB: float(asked.log_probs[place[0]]), VERDICT: float(asked.verdicts[place[0]])}
        raised = {name: weight * (own[name] - usual.get(name, 0.0)) for name, weight in estimate.odds.weights.items()}
        most = sorted((name for name in raised if raised[name] > 0), key=lambda name: -raised[name])
        reasons.append(most[:REASONS])
    return reasons
