"""All parts of an evaluation put together: what metrics.json holds.

    evaluation = beside_ours(world, table, Scored.of(world, table, made), made, policy, published)
    evaluation = beside_floors(world, table, told)      # without a policy

The full method is a frontier: the reach of its score, and gamma in the reward where the ablation has a policy without
penalty, trade rejections caught for likes lost. So is every other score, by its reach, and exposure times rejection
rate, by its exponent: they are compared as frontiers too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.blocklist.asking import Policy
from conrec.blocklist.counts import Counts, things_of
from conrec.blocklist.fitting import Scoring
from conrec.blocklist.ranking import Answers, Ranking, published
from conrec.blocklist.resolve import leaf_vectors
from conrec.evaluation.baselines import EXPOSURE_LINE
from conrec.evaluation.candidates import described
from conrec.evaluation.compare import ablation, catch_curves, comparisons, difference, line_point, lines_of_all
from conrec.evaluation.document import Evaluation
from conrec.evaluation.headline import pairs_told
from conrec.evaluation.measured import Measured, frontier, system_of
from conrec.evaluation.metrics import SERVED_K
from conrec.evaluation.rankings import answers_of, with_odds
from conrec.evaluation.responsiveness import responsiveness
from conrec.evaluation.rows import LIST, Generated
from conrec.evaluation.systems import AFTER, BEFORE, COUNTED, FULL, NAMES, UNPUNISHED
from conrec.evaluation.target_coverage import target_coverage
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.feedback.histories import rejections_in_history
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import targets
from conrec.progress import progress, warn
from conrec.ragged import Ragged

REACHES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0, 10.0)
"""How much exposure counts beside the odds: the points of the full method's frontier, and of every other score's."""
LEAST_USERS = 100
"""With fewer users in a half, an FHR is uncertain by .04: as much as what settings of one system differ by."""


@dataclass(frozen=True)
class Scored:
    """The rows that are a score over what a policy says, each by reach: ours, without the policy, without the penalty
    (empty where the ablation was not asked for), and by id other people's policies with our odds beside them."""

    ours: Mapping[float, Measured]
    counted: Mapping[float, Measured]
    unpunished: Mapping[float, Measured]
    with_our_odds: Mapping[str, Mapping[float, Measured]]

    @classmethod
    def of(cls, world: World, table: Mapping[str, Measured], made: Scoring) -> Scored:
        """`table`: the rows by id, the policy after GRPO among them."""
        score, served = made.score, world.config.score.reach
        reaches = sorted({*REACHES, served})
        ours = frontier(world, NAMES[FULL], "ours", table[AFTER].row, score, reaches)
        counted = frontier(world, NAMES[COUNTED], "ablation", None, score, reaches)
        # By itself once more: the row says how many users a second one ranking takes.
        counted |= frontier(world, NAMES[COUNTED], "ablation", None, score, (served,))
        unpunished: dict[float, Measured] = {}
        if UNPUNISHED in table:
            unpunished = frontier(world, NAMES[UNPUNISHED], "ours", table[UNPUNISHED].row, score, reaches)
        # Fair to what learned from nothing but sequences.
        theirs = with_odds(score)
        others = {
            f"{id} with our odds": frontier(
                world, f"{row.name}, our odds added", "generative", row.row, theirs, REACHES
            )
            for id, row in table.items()
            if row.group == "generative" or id == BEFORE
        }
        return cls(ours, counted, unpunished, others)


def beside_ours(
    world: World,
    table: Mapping[str, Measured],
    scored: Scored,
    made: Scoring,
    policy: Policy,
    published: Mapping[str, Any],
) -> Evaluation:
    """Every figure of every system, and the comparisons at equal harm.

    `policy` is the one after GRPO, to be asked; `published`: the headline (`conrec.evaluation.published_lists`).
    """
    ours, unpunished = scored.ours, scored.unpunished
    served = world.config.score.reach
    rows = {**table, FULL: ours[served], COUNTED: scored.counted[served]}
    added = {id: by_reach[1.0] for id, by_reach in scored.with_our_odds.items()}
    lines = {"CoNRec, by reach": line_of(world, ours), **lines_of_all(world, rows)}
    if unpunished:
        lines["CoNRec with gamma = 0"] = line_of(world, unpunished)
    vectors = leaf_vectors(world.catalogue.codebook, world.catalogue.trie)
    return Evaluation(
        about=about(world) | {"equal harm": equal_harm(world)},
        published=published,
        systems={row.name: system_of(world, row, vectors) for row in rows.values()},
        ours=NAMES[FULL],
        lines=lines,
        catch_curves=catch_curves(world, rows, (FULL, COUNTED, BEFORE)),
        comparisons=comparisons(
            world, {**rows, **added}, [*ours.values(), *unpunished.values()], settings_of_others(table, scored)
        ),
        ablation=ablation(world, rows),
        differences={f"{NAMES[AFTER]} - {NAMES[BEFORE]}": difference(world, rows, AFTER, BEFORE)},
        calibration=made.calibration.to_json(),
        score=made.score.to_json(),
        target_coverage=coverage(world),
        responsiveness=answers(world, made, policy),
        forgetting={row.name: told for row in table.values() if (told := row.row.alignment_accuracy)},
        verdict_auc={row.name: told for row in table.values() if (told := row.row.verdict_auc)},
    )


def settings_of_others(table: Mapping[str, Measured], scored: Scored) -> Mapping[str, Sequence[Measured]]:
    """Id -> all settings of the system of which that row is one: what `comparisons` takes."""
    exposure = [table[id] for id in EXPOSURE_LINE]
    by_reach = {COUNTED: scored.counted, **scored.with_our_odds}
    return dict.fromkeys(EXPOSURE_LINE, exposure) | {id: [*rows.values()] for id, rows in by_reach.items()}


def equal_harm(world: World) -> str:
    """On how many users frontiers are chosen and read; warns where they are few."""
    defined = (targets.lengths > 0 for targets in (world.targets.future_negatives, world.targets.future_positives))
    users = [
        len(np.unique(world.anchors.users[anchors & half]))
        for anchors in defined
        for half in (world.halves, ~world.halves)
    ]
    told = f"a frontier is chosen on one half of the users and read on the other, of at least {min(users):,} users each"
    if min(users) < LEAST_USERS:
        told += f"; below {LEAST_USERS:,} it is chosen by chance"
        warn(f"FHR at equal FPH: {told}; a longer log or more users make it a comparison")
    return told


def line_of(world: World, frontier: Mapping[float, Measured]) -> list[dict[str, Any]]:
    """The points of a frontier, named by their reach."""
    return [line_point(f"{reach:g}", world, row.values) for reach, row in frontier.items()]


def beside_floors(world: World, table: Mapping[str, Measured], told: Mapping[str, np.ndarray]) -> Evaluation:
    """What can be said without a policy: the floors and the systems from outside, these against the strongest floor."""
    strongest = EXPOSURE_LINE[1]
    return Evaluation(
        about=about(world),
        published=pairs_told(world, told),
        systems={row.name: system_of(world, row, None) for row in table.values()},
        lines=lines_of_all(world, table),
        catch_curves=catch_curves(world, table),
        differences={
            f"{row.name} - {strongest}": difference(world, table, id, strongest)
            for id, row in table.items()
            if row.group == "outside"
        },
    )


def about(world: World) -> dict[str, Any]:
    """Facts above the table."""
    return {
        "cut": world.config.timeline.cut.isoformat(),
        "anchors": int(world.measured.sum()),
        "users": len(np.unique(world.anchors.users[world.measured])),
        "served users": len(world.served),
        "K": SERVED_K,
        "excluded": "every item of the user's history",
        "candidates": described(world.candidates, world.measured),
    }


def tonight(world: World, policy: Policy, answer: Generated) -> Answers:
    """What the night generates for the users that it serves: in the row there are more beams where it takes few."""
    if world.config.generate.beam_width < LIST:
        return policy.generate(world.served)
    return answers_of(world, answer).take(world.served_rows)


def coverage(world: World) -> dict[str, Any]:
    """How often each training target holds one of the user's strongest negative interests."""
    config, first = world.config, world.catalogue.semantic_ids[:, 0]
    neighbours = swing_neighbours(world.past, len(first), config.swing, config.seed)
    return target_coverage(
        world.events, world.anchors, neighbours, first, resamples=config.evaluation.resamples, seed=config.seed
    )


def answers(world: World, made: Scoring, policy: Policy) -> dict[str, Any]:
    """Responsiveness of the published list to one more rejection, and to one more like."""
    config, catalogue = world.config, world.catalogue
    cut_us = config.timeline.cut_us
    # The added events lie at the cut: of things, only what lay before counts, as in the night before.
    before = Counts.at(world.events, cut_us - 1, things_of(catalogue))

    def serve(events: Events, anchors: Anchors) -> np.ndarray:
        ranking = Ranking(before.later(events, cut_us), made.score, catalogue.trie, catalogue.live)
        thresholds = made.calibration.thresholds(rejections_in_history(events, anchors))
        answers = dataclasses.replace(policy, events=events).generate(anchors)
        parts = [np.zeros((0, 0), np.int32)]
        for places, rows in published(ranking, events, anchors.users, answers, cut_us, config.guardrails):
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
