"""The headline of an evaluation: the lists as a night would publish them at the cut, and what the window made of them.

    # What report.html opens with: Evaluation.published.
    document = published_lists(world, made, fitting, calibrated_on, policy, answers)

Every system goes through the same night: the same users, candidates, exposure, guardrails and calibration; only what
says whether a user will reject an item differs. Ours stands there with the policy and without it, beside boosted trees
on the same counted columns and the odds of the items alone. Its parts, added one by one, list what the policy generates
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from conrec.blocklist.asking import Policy
from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.counts import Counts
from conrec.blocklist.fitting import Fitting, Scoring
from conrec.blocklist.ranking import Answers, Ranking, Scores, held_at, listing, published
from conrec.blocklist.score import Estimate, Linear, Score
from conrec.evaluation.examples import examples
from conrec.evaluation.headline import EVERYBODY, ODDS, OURS, PARTS, TREES, WITHOUT, Published, headline
from conrec.evaluation.published import Pairs, shown_pairs
from conrec.evaluation.tree_grid import grid_scores
from conrec.evaluation.trees import Trees, fit_trees
from conrec.feedback.histories import rejections_in_history
from conrec.progress import progress, warn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from conrec.blocklist.guardrails import Rows
    from conrec.evaluation.world import World


NEVER = Linear({}, -np.inf)
"""Odds of what the policy did not generate, where nothing else is listed."""
NOTHING = Linear({}, 0.0)


@dataclass(frozen=True)
class TreeScores:
    """Boosted trees in the place of the fitted odds, of items alone: no semantic ID is ever listed."""

    trees: Trees
    exposure: Linear
    reach: float
    judged: Estimate | None = None

    def parts(self, counts: Counts, users: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shape: users (B,), expected (B, T) -> (B, T) float32 each."""
        items, exposure = counts.things.item_count, self.exposure.dense(counts, users, expected)
        odds = np.full(exposure.shape, -np.inf, np.float32)
        odds[:, :items] = grid_scores(
            self.trees,
            {name: values[users] for name, values in counts.of_users.items()},
            {name: values[:items] for name, values in counts.of_things.items()},
            {name: (crossed.dense(users), crossed.keys[:items]) for name, crossed in counts.crossed.items()},
        )
        return odds, exposure

    def parts_of(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Not asked for: no policy stands beside the trees."""
        raise NotImplementedError


def published_lists(
    world: World,
    made: Scoring,
    fitting: Fitting,
    calibrated_on: Answers,
    policy: Policy,
    answers: Answers,
    told: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Figures of every system, by name, the curves of the picture, and three users in words.

    Lengths too are those of the lists of `world.served`: a night publishes one for who is gone after the cut as well.
    `made`: what `fitting` was fitted to; `calibrated_on`: what the policy of then generated for the users that
    calibrated. `answers`: what the policy generated for `world.served`.
    `told`: systems from outside with their scores of the pairs (N,).
    """
    score = made.score
    shown = Shown.of(world, policy)
    odds = score.counted.odds.of(shown.columns)
    if score.judged is not None:
        odds[shown.known] = score.judged.odds.of(shown.judged)
    rivals = rivals_of(world, made, fitting, shown)
    pairs, counts = shown.pairs, shown.counts
    systems = {OURS: lists_of(world, counts, score, odds, answers, pairs, made.calibration)}
    parts = PARTS if score.judged is not None else {}
    with progress("  lists of the parts", len(parts)) as bar:
        for name, summed in parts.items():
            alone, values = part_of(summed, shown)
            calibration = fitting.calibrated(alone, fitting.asked_rows()[1], calibrated_on)
            systems[name] = lists_of(world, counts, alone, values, answers, pairs, calibration)
            bar.advance(note=name)
    checks, nothing = np.flatnonzero(fitting.calibrates), Answers.nothing(len(world.served))
    with progress("  lists of the rivals", len(rivals)) as bar:
        for name, (rival, values) in rivals.items():
            calibration = fitting.calibrated(rival, checks, Answers.nothing(len(checks)))
            systems[name] = lists_of(world, counts, rival, values, nothing, pairs, calibration)
            bar.advance(note=name)
    users = examples(world, counts, score, answers, made.calibration, systems[OURS].best, shown.usual())
    systems[EVERYBODY] = _for_everybody(world, made, counts, pairs)
    systems |= {name: Published.of_pairs(scores) for name, scores in (told or {}).items()}
    return headline(world, systems, pairs) | {"examples": users}


@dataclass(frozen=True)
class Shown:
    """The pairs that judge the lists, and what is known of each.

    Shape: columns: name -> (N,), what is counted; known (N,) bool, whose item has an ID to ask the policy about;
    judged: name -> the columns of those, and what the policy says of them.
    """

    pairs: Pairs
    counts: Counts
    columns: Mapping[str, np.ndarray]
    known: np.ndarray
    judged: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, world: World, policy: Policy) -> Shown:
        """Of `world.served`."""
        anchors, counts = world.served, world.counts(world.config.timeline.cut_us)
        pairs = shown_pairs(world.events, anchors)
        columns = counts.columns(anchors.users[pairs.users], pairs.items)
        leaves = world.catalogue.trie.item_leaves[pairs.items].astype(np.int64)
        known = leaves >= 0
        judged = {name: values[known] for name, values in columns.items()}
        judged |= policy.says(anchors, pairs.users[known], leaves[known])
        return cls(pairs, counts, columns, known, judged)

    def usual(self) -> dict[str, float]:
        """Mean of each column over what is shown."""
        every = {**self.judged, **self.columns}
        return {name: float(np.mean(values)) for name, values in every.items() if len(values)}


def rivals_of(world: World, made: Scoring, fitting: Fitting, shown: Shown) -> dict[str, tuple[Scores, np.ndarray]]:
    """What ranks in the place of our score, without a policy, with its odds (N,) of the pairs."""
    counted, columns, reach = made.score.counted, shown.columns, world.config.score.reach
    items = Linear({"rejected": 1.0, "liked": -1.0}, 0.0)
    found: dict[str, tuple[Scores, np.ndarray]] = {
        WITHOUT: (Score(counted, None, reach), counted.odds.of(columns)),
        ODDS: (Score(Estimate(items, counted.exposure), None, reach), items.of(columns)),
    }
    names = tree_columns(shown.counts)
    answers, rejected, users = fitting.answers()
    if not rejected.any() or rejected.all():
        warn(f"{TREES} is left out: of {len(rejected):,} pairs that it would be fitted on, all have one outcome")
        return found
    with progress("  boosted trees"):
        fitted_on = np.stack([answers[name] for name in names], axis=1)
        trees = fit_trees(fitted_on, names, rejected, users, world.config.seed)
    of_pairs = trees.scores(np.stack([columns[name] for name in names], axis=1))
    return found | {TREES: (TreeScores(trees, counted.exposure, reach), of_pairs)}


def tree_columns(counts: Counts) -> tuple[str, ...]:
    """What the boosted trees read of a pair."""
    return (*counts.odds_names, "shown", "fresh")


def part_of(summed: Sequence[str], shown: Shown) -> tuple[Score, np.ndarray]:
    """A sum of columns over what the policy generates, and its odds (N,) of the pairs."""
    part = Linear({column: -1.0 if column == "liked" else 1.0 for column in summed}, 0.0)
    values = np.full(len(shown.pairs), NEVER.bias)
    values[shown.known] = part.of(shown.judged)
    return Score(Estimate(NEVER, NOTHING), Estimate(part, NOTHING), 0.0), values


def _for_everybody(world: World, made: Scoring, counts: Counts, pairs: Pairs) -> Published:
    """The list that a night publishes beside the users' own."""
    live = world.catalogue.live
    scores = made.score.for_everybody(counts)[: len(live)]
    thresholds = {one.alpha: one.overall.threshold for one in (made.everybody, *made.everybody.others)}
    lengths = {
        f"{alpha:g}": np.full(len(world.served), 0 if threshold is None else np.count_nonzero(scores >= threshold))
        for alpha, threshold in thresholds.items()
    }
    found = scores[pairs.items]
    best = np.full(len(world.served), scores.max(initial=-np.inf))
    return Published(found, dict.fromkeys(lengths, found), found, best, lengths, made.everybody)


def lists_of(
    world: World,
    counts: Counts,
    score: Scores,
    odds: np.ndarray,
    answers: Answers,
    pairs: Pairs,
    calibration: Calibration,
) -> Published:
    """What this score publishes for `world.served`. Shape: odds (N,) of the pairs; answers a row a user."""
    anchors, config, live = world.served, world.config, world.catalogue.live
    ranking = Ranking(counts, score, world.catalogue.trie, live)
    rejections = rejections_in_history(world.events, anchors)
    thresholds = {f"{one.alpha:g}": one.thresholds(rejections) for one in (calibration, *calibration.others)}
    way = (ranking, world.events, anchors.users, answers, config.timeline.cut_us, config.guardrails)
    best = np.full(len(anchors), -np.inf, np.float32)
    found = listing(_noting(published(*way), best), pairs.users, pairs.items, len(live), thresholds)
    if config.guardrails.max_user_share == 1:
        return Published(found.scores, dict.fromkeys(thresholds, found.scores), odds, best, found.lengths, calibration)
    # What is held back depends on how many users a threshold predicts an item for.
    at_alpha, lengths = {}, {}
    for name, limits in thresholds.items():
        held = held_at(*way, limits)
        listed = listing(published(*way, held), pairs.users, pairs.items, len(live), {name: limits})
        at_alpha[name], lengths[name] = listed.scores, listed.lengths[name]
    return Published(at_alpha[f"{calibration.alpha:g}"], at_alpha, odds, best, lengths, calibration)


def _noting(lists: Iterator[tuple[np.ndarray, Rows]], best: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    """The same lists; the largest score of each is left in `best` (U,)."""
    for places, rows in lists:
        predicted = ~rows.explicit
        np.maximum.at(best, places[rows.rows[predicted]], rows.scores[predicted])
        yield places, rows
