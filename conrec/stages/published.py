"""The headline of an evaluation: the lists as a night would publish them at the cut, and what the window made of them.

    document = published_lists(world, asked)      # Evaluation.published, what report.html opens with

Every system goes through the same night: the same users, candidates, exposure, guardrails and calibration; only what
says whether a user will reject an item differs. Ours stands there with the policy and without it, beside boosted trees
on the same counted columns and the odds of the items alone. Its parts, added one by one, list what the policy generates
and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.counts import Counts
from conrec.blocklist.guardrails import held_back
from conrec.blocklist.ranking import Asked, Ranking, Scores, admitted, listing, published
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Linear, Score
from conrec.evaluation.published import (
    Pairs,
    at_threshold,
    auc,
    catch_at,
    catch_curve,
    list_lengths,
    paired,
    shown_pairs,
    within_user_auc,
)
from conrec.evaluation.tree_grid import grid_scores
from conrec.evaluation.trees import Trees, fit_trees
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.progress import progress, warn
from conrec.stages.inputs import rejections_in_history
from conrec.stages.scoring import Fitting, Policy, asked_to_calibrate
from conrec.stages.show import item_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from conrec.blocklist.guardrails import Rows
    from conrec.stages.systems import World

OURS, COUNTED, TREES, ODDS = "CoNRec", "CoNRec without the policy", "LightGBM", "odds of the items"
EVERYBODY = "one list for everybody"
PARTS = {
    f"{OURS}, generator alone": (LOG_PROB,),
    f"{OURS}, generator and verdict": (LOG_PROB, VERDICT),
    f"{OURS}, generator, verdict and counts, unweighted": (LOG_PROB, VERDICT, "rejected", "liked", "leaning"),
}
"""Parts of the full method -> what is summed: log P(ID, rejected | history) where both are the policy's."""
LISTS = (OURS, COUNTED, TREES, ODDS, EVERYBODY, *PARTS)
"""The systems whose lists are measured."""
NEVER = Linear({}, -50.0)
"""Odds of what the policy did not generate, where nothing else may be listed."""
NOTHING = Linear({}, 0.0)
FALSE_BLOCKS = np.linspace(0.0, 0.15, 61)
FEW_SHOWN, FEW_EVENTS = 10, 10
"""Items shown, and users with events, fewer times than this are where counts are thin."""

EXAMPLES = {"sure": 0.1, "middling": 0.5, "unsure": 0.9}
"""Users that are shown in words -> the share of the users with a list whose largest score is above theirs."""
EXAMPLE_LINES, REASONS = 5, 2
"""Rows of each part of an example, and columns that are named for an item."""
IN_WINDOW = {LIKED: "liked", REJECTED: "rejected", SHOWN: "shown"}
NOT_SHOWN = "not shown"


@dataclass(frozen=True)
class TreeScores:
    """Boosted trees in the place of the fitted odds, of items alone: no semantic ID is ever listed."""

    trees: Trees
    exposure: Linear
    reach: float
    judged: Estimate | None = None

    def parts(self, counts: Counts, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shape: users (B,) -> (B, T) float32 each."""
        items, exposure = counts.things.item_count, self.exposure.dense(counts, users)
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


@dataclass(frozen=True)
class Published:
    """A system's lists.

    Shape: scores (N,) of the pairs in the lists, `at_alpha` in those of each alpha, which differ where items are held
    back; odds (N,) of a rejection anywhere; best (U,) the largest score of each list, -inf where it holds nothing
    predicted.
    """

    scores: np.ndarray
    at_alpha: Mapping[str, np.ndarray]
    odds: np.ndarray
    best: np.ndarray
    lengths: Mapping[str, np.ndarray]
    calibration: Calibration | None
    """None where pairs alone were scored: nothing was listed."""

    @classmethod
    def of_pairs(cls, scores: np.ndarray) -> Published:
        """A system that scored the pairs (N,), and has no lists."""
        return cls(scores, {}, scores, np.zeros(0), {}, None)


def pairs_told(world: World, told: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Figures of the systems that scored the pairs of `world.served` (N,), without lists; empty without any."""
    systems = {name: Published.of_pairs(scores) for name, scores in told.items()}
    return _document(world, systems, shown_pairs(world.events, world.served)) if systems else {}


def published_lists(
    world: World, policy: Policy, asked: Asked, told: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Figures of every system, by name, the curves of the picture, and three users in words.

    `asked`: what the policy generated for `world.served`, the users that a night at the cut predicts for. `told`:
    systems from outside with their scores of the pairs (N,).
    """
    config, anchors = world.config, world.served
    made, fitting = world.scoring, Fitting.load(world.run)
    pairs = shown_pairs(world.events, anchors)
    counts = world.counts(config.timeline.cut_us)
    columns = counts.columns(anchors.users[pairs.users], pairs.items)
    leaves = world.catalogue.trie.item_leaves[pairs.items].astype(np.int64)
    known = leaves >= 0
    judged = {name: values[known] for name, values in columns.items()}
    judged |= policy.says(anchors, pairs.users[known], leaves[known])

    counted = made.score.counted
    items = Linear({"rejected": 1.0, "liked": -1.0}, 0.0)
    names = (*counts.odds_names, "shown", "fresh")
    answers, rejected, users = fitting.answers()
    estimates: dict[str, tuple[Scores, np.ndarray]] = {
        COUNTED: (Score(counted, None, config.score.reach), counted.odds.of(columns)),
        ODDS: (Score(Estimate(items, counted.exposure), None, config.score.reach), items.of(columns)),
    }
    if rejected.any() and not rejected.all():
        with progress("  boosted trees"):
            trees = fit_trees(np.stack([answers[name] for name in names], axis=1), names, rejected, users, config.seed)
        of_pairs = trees.scores(np.stack([columns[name] for name in names], axis=1))
        estimates[TREES] = TreeScores(trees, counted.exposure, config.score.reach), of_pairs
    else:
        warn(f"{TREES} is left out: of {len(rejected):,} pairs that it would be fitted on, all have one outcome")
    odds = counted.odds.of(columns)
    if made.score.judged is not None:
        odds[known] = made.score.judged.odds.of(judged)
    systems = {OURS: lists_of(world, counts, made.score, odds, asked, pairs, made.calibration)}
    parts, calibrated_on = PARTS if made.score.judged is not None else {}, asked_to_calibrate(world.run)
    with progress("  lists of the parts", len(parts)) as bar:
        for name, summed in parts.items():
            part = Linear({column: -1.0 if column == "liked" else 1.0 for column in summed}, 0.0)
            alone = Score(Estimate(NEVER, NOTHING), Estimate(part, NOTHING), 0.0)
            calibration = fitting.calibrated(alone, fitting.asked_rows()[1], calibrated_on)
            values = np.full(len(pairs), NEVER.bias)
            values[known] = part.of(judged)
            systems[name] = lists_of(world, counts, alone, values, asked, pairs, calibration)
            bar.advance(note=name)
    checks = np.flatnonzero(fitting.calibrates)
    with progress("  lists of the rivals", len(estimates)) as bar:
        for name, (score, values) in estimates.items():
            calibration = fitting.calibrated(score, checks, Asked.nothing(len(checks)))
            systems[name] = lists_of(world, counts, score, values, Asked.nothing(len(anchors)), pairs, calibration)
            bar.advance(note=name)
    usual = {name: float(np.mean(values)) for name, values in (judged | columns).items() if len(values)}
    shown = examples(world, counts, made.score, asked, made.calibration, systems[OURS].best, usual)
    systems[EVERYBODY] = _for_everybody(world, counts, pairs)
    systems |= {name: Published.of_pairs(scores) for name, scores in (told or {}).items()}
    return _document(world, systems, pairs) | {"examples": shown}


def _for_everybody(world: World, counts: Counts, pairs: Pairs) -> Published:
    """The list that a night publishes beside the users' own."""
    made, live = world.scoring, world.catalogue.live
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
    asked: Asked,
    pairs: Pairs,
    calibration: Calibration,
) -> Published:
    """What a night with this score publishes for `world.served`. Shape: odds (N,) of the pairs; asked a row a user."""
    anchors, config, live = world.served, world.config, world.catalogue.live
    ranking = Ranking(counts, score, world.catalogue.trie, live)
    rejections = rejections_in_history(world.events, anchors)
    thresholds = {f"{one.alpha:g}": one.thresholds(rejections) for one in (calibration, *calibration.others)}
    way = (ranking, world.events, anchors.users, asked, config.timeline.cut_us, config.guardrails)
    best = np.full(len(anchors), -np.inf, np.float32)
    found = listing(_noting(published(*way), best), pairs.users, pairs.items, len(live), thresholds)
    if config.guardrails.max_user_share == 1:
        return Published(found.scores, dict.fromkeys(thresholds, found.scores), odds, best, found.lengths, calibration)
    # What is held back depends on how many users a threshold predicts an item for.
    at_alpha, lengths = {}, {}
    for name, limits in thresholds.items():
        counts_of_items = np.zeros(len(live), np.int64)
        for block in admitted(*way, lambda places, _, limits=limits: limits[places]):  # type: ignore[misc]
            counts_of_items += np.bincount(block.predicted.items, minlength=len(live))
        held = held_back(counts_of_items, len(anchors), config.guardrails)
        listed = listing(published(*way, held), pairs.users, pairs.items, len(live), {name: limits})
        at_alpha[name], lengths[name] = listed.scores, listed.lengths[name]
    return Published(at_alpha[f"{calibration.alpha:g}"], at_alpha, odds, best, lengths, calibration)


def _noting(lists: Iterator[tuple[np.ndarray, Rows]], best: np.ndarray) -> Iterator[tuple[np.ndarray, Rows]]:
    """The same lists; the largest score of each is left in `best` (U,)."""
    for places, rows in lists:
        predicted = ~rows.explicit
        np.maximum.at(best, places[rows.rows[predicted]], rows.scores[predicted])
        yield places, rows


def examples(
    world: World,
    counts: Counts,
    score: Score,
    asked: Asked,
    calibration: Calibration,
    best: np.ndarray,
    usual: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Users of EXAMPLES: what they rejected, what their list at the served alpha holds and why, what became of it.

    Shape: asked and best (U,) of `world.served`, best from `_noting`; `usual`: mean of each column over what is shown.
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
        one, said = anchors.take(row), asked.take(row)
        found.append({"kind": kind} | _example(world, ranking, score, one, said, thresholds[row[0]], usual))
    return found


def _example(
    world: World,
    ranking: Ranking,
    score: Score,
    anchor: Anchors,
    asked: Asked,
    threshold: np.float32,
    usual: Mapping[str, float],
) -> dict[str, Any]:
    """One user in words; anchor and asked have one row."""
    events, config = world.events, world.config
    lists = published(ranking, events, anchor.users, asked, config.timeline.cut_us, config.guardrails)
    ((_, rows),) = lists
    held = rows.items[~rows.explicit & (rows.scores >= threshold)]
    items = held[:EXAMPLE_LINES]
    odds = ranking.parts(anchor.users, asked)[0][0, items]
    words = item_words(world.catalogue.items)
    reasons = _reasons(ranking, score, asked, int(anchor.users[0]), items, usual)
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


def _document(world: World, systems: Mapping[str, Published], pairs: Pairs) -> dict[str, Any]:
    settings, seed, anchors = world.config.evaluation, world.config.seed, world.served
    drawn: Any = {"resamples": settings.resamples, "seed": seed}
    rejections = rejections_in_history(world.events, anchors)
    shown = np.bincount(world.past.items, minlength=pairs.items.max(initial=-1) + 1)
    events = (anchors.ends - anchors.starts)[pairs.users]
    thin = {
        f"items shown fewer than {FEW_SHOWN} times": shown[pairs.items] < FEW_SHOWN,
        f"users with fewer than {FEW_EVENTS} events": events < FEW_EVENTS,
    }
    document: dict[str, Any] = {
        "alpha": world.config.calibration.alpha,
        "users": len(anchors),
        "pairs": {"rejected": int(pairs.rejected.sum()), "liked": int((~pairs.rejected).sum())},
        "systems": {},
        "curves": {},
        "against": {},
    }
    for name, system in systems.items():
        at_alpha, served = {}, system.calibration
        for one in (served, *served.others) if served is not None else ():
            limits = one.thresholds(rejections)
            label = f"{one.alpha:g}"
            figures = at_threshold(system.at_alpha[label], pairs, limits[pairs.users], **drawn)
            lengths = list_lengths(system.lengths[label], anchors.users, **drawn)
            at_alpha[label] = figures | {"length": lengths}
        document["systems"][name] = {
            "at_alpha": dict(sorted(at_alpha.items(), key=lambda pair: float(pair[0]))),
            "catch_at": {f"{share:g}": one for share, one in catch_at(system.scores, pairs, **drawn).items()},
            "auc": auc(system.odds, pairs, **drawn),
            "within_user_auc": within_user_auc(system.odds, pairs, **drawn),
            "thin": {label: auc(system.odds[mask], pairs.where(mask), **drawn) for label, mask in thin.items()},
        }
        if name not in PARTS:
            curve = catch_curve(system.scores, pairs, FALSE_BLOCKS, **drawn)
            document["curves"][name] = {"false_block": FALSE_BLOCKS.tolist()} | {
                end: values.tolist() for end, values in curve.items()
            }
        if name != OURS and OURS in systems:
            lists = paired(systems[OURS].scores, system.scores, pairs, **drawn)
            everywhere = paired(systems[OURS].odds, system.odds, pairs, **drawn)
            document["against"][name] = {
                "auc_difference": everywhere.auc_difference,
                "within_user_auc_difference": everywhere.within_user_auc_difference,
                "catch_ratio": {f"{share:g}": figure for share, figure in lists.catch_ratio.items()},
                "catch_difference": {f"{share:g}": figure for share, figure in lists.catch_difference.items()},
                "thin": {
                    label: paired(
                        systems[OURS].odds[mask], system.odds[mask], pairs.where(mask), **drawn
                    ).auc_difference
                    for label, mask in thin.items()
                },
            }
    return document
