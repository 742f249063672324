"""SeqRules: recency-weighted rules from one rejection to a later one, counted from users' sequences. No weights.

    tuned = tune_rules(events, settings.timeline, item_count, RULE_TRIALS)
    scores = tuned.model.scores(histories)      # (A, I)

What Spotify's paper at RecSys 2026 sets beside its sequence models, after the sequential rules of Ludewig and Jannach
(arXiv 1803.09587): every rejection i before a rejection j of the same user counts for the rule i -> j, by 1 / the steps
between them, and by how long before the cut j was. A rule is drawn towards what everybody rejects:

    P(j | i) = (w_ij + prior p_j) / (w_i + prior)
    score(j) = sum over the history, P(j | i) / how many rejections back i was

and p_j, the share of all rejections that j has, is what a user without rejections gets.

Invariant: rules are counted on events at or before the cut, which is cut off here; a prediction reads them and the
user's own rejections, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from conrec.config import DAY_US
from conrec.errors import DataError
from conrec.evaluation import tuning
from conrec.evaluation.baselines import Histories, best_items
from conrec.evaluation.tuning import Question, RuleTrial, Tuned, tune
from conrec.feedback.events import REJECTED, Events

if TYPE_CHECKING:
    from conrec.config import TimelineSettings

SEQ_RULES = "SeqRules on negatives"
"""The name of the row."""
STEPS = 50
"""Rules reach over so many rejections, and so many of a history are read: as far as the sequential models do."""
RULE_TRIALS = tuple(RuleTrial(half_life, prior) for half_life in (3.0, 300.0) for prior in (30.0, 300.0))
"""As many as the sequential models have."""


@dataclass(frozen=True)
class Rules:
    """Counted rules. Shape: weights (I, I) w_ij; totals (I,) w_i; shares (I,) p_j, of sum 1."""

    weights: sparse.csr_array
    totals: np.ndarray
    shares: np.ndarray
    prior: float
    epochs: int = 1

    def scores(self, histories: Histories) -> np.ndarray:
        """Shape: (B, I) float32."""
        rejected = histories.kinds == REJECTED
        rows, items = histories.items.rows[rejected], histories.items.values[rejected]
        counts = np.bincount(rows, minlength=len(histories))
        back = np.repeat(np.cumsum(counts), counts) - np.arange(len(rows))
        read = back <= STEPS
        values = 1 / back[read] / (self.totals[items[read]] + self.prior)
        said = sparse.csr_array((values, (rows[read], items[read])), shape=(len(histories), len(self.shares)))
        drawn = self.prior * np.asarray(said.sum(axis=1)).ravel()
        # Who rejected nothing yet gets everybody's shares.
        drawn[counts == 0] = 1.0
        return np.asarray((said @ self.weights).toarray() + drawn[:, None] * self.shares, np.float32)


def fit_rules(events: Events, cut_us: int, item_count: int, trial: RuleTrial) -> Rules:
    """Counts the rules of the events at or before the cut. Memory is that of the rules.

    Raises `DataError` when nothing was rejected before the cut.
    """
    past = events.before(cut_us)
    past = past.where(past.kinds == REJECTED)
    if not len(past):
        raise DataError(f"{SEQ_RULES}: nothing to count: nobody rejected anything until the cut; check timeline.cut")
    users = past.rows
    recent = 0.5 ** ((cut_us - past.times) / (trial.half_life_days * DAY_US))
    weights = sparse.csr_array((item_count, item_count), dtype=np.float64)
    for step in range(1, STEPS + 1):
        first = np.flatnonzero(users[:-step] == users[step:])
        if not len(first):
            break
        pairs = (past.items[first], past.items[first + step])
        weights = weights + sparse.csr_array((recent[first + step] / step, pairs), shape=weights.shape)
    shares = np.bincount(past.items, recent, item_count)
    return Rules(weights, np.asarray(weights.sum(axis=1)).ravel(), shares / max(shares.sum(), 1e-300), trial.prior)


def tune_rules(
    events: Events, timeline: TimelineSettings, item_count: int, trials: Sequence[RuleTrial]
) -> Tuned[Rules]:
    """Chooses a trial on the validation anchors, then counts until the cut.

    Raises `DataError` when no user can be measured there, ValueError without trials.
    """

    def fit(until_us: int, trial: RuleTrial, stop: Callable[[Rules], float] | None, _: int | None) -> Rules:
        rules = fit_rules(events, until_us, item_count, trial)
        if stop is not None:
            stop(rules)
        return rules

    def ranked(rules: Rules, question: Question) -> np.ndarray:
        return best_items(rules.scores, question.histories, question.excluded, tuning.TOP)[0]

    return tune(SEQ_RULES, trials, fit, ranked, events, timeline)
