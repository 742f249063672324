"""The figures of published lists: what a threshold catches and spares, and ours beside every other.

    document = headline(world, systems, pairs)      # Evaluation.published, without the users in words

Invariant: a system is measured by its lists and scores alone, whatever made them, on the same pairs and resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from conrec.blocklist.calibrate import Calibration
from conrec.blocklist.score import LOG_PROB, VERDICT
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
from conrec.evaluation.systems import COUNTED, NAMES
from conrec.feedback.histories import rejections_in_history

if TYPE_CHECKING:
    from collections.abc import Mapping

    from conrec.evaluation.world import World


OURS, WITHOUT, TREES, ODDS = "CoNRec", NAMES[COUNTED], "LightGBM", "odds of the items"
EVERYBODY = "one list for everybody"
PARTS = {
    f"{OURS}, generator alone": (LOG_PROB,),
    f"{OURS}, generator and verdict": (LOG_PROB, VERDICT),
    f"{OURS}, generator, verdict and counts, unweighted": (LOG_PROB, VERDICT, "rejected", "liked", "leaning"),
}
"""Parts of the full method -> what is summed: log P(ID, rejected | history) where both are the policy's."""
LISTS = (OURS, WITHOUT, TREES, ODDS, EVERYBODY, *PARTS)
"""The systems whose lists are measured."""
FALSE_BLOCKS = np.linspace(0.0, 0.15, 61)
FEW_SHOWN, FEW_EVENTS = 10, 10
"""Items shown, and users with events, fewer times than this are where counts are thin."""


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
    return headline(world, systems, shown_pairs(world.events, world.served)) if systems else {}


def headline(world: World, systems: Mapping[str, Published], pairs: Pairs) -> dict[str, Any]:
    """Figures of every system by name, the curves of the picture, and ours against each other one."""
    settings, anchors, ours = world.config.evaluation, world.served, systems.get(OURS)
    drawn: Any = {"resamples": settings.resamples, "seed": world.config.seed}
    rejections = rejections_in_history(world.events, anchors)
    thin = thin_pairs(world, pairs)
    return {
        "alpha": world.config.calibration.alpha,
        "users": len(anchors),
        "pairs": {"rejected": int(pairs.rejected.sum()), "liked": int((~pairs.rejected).sum())},
        "systems": {
            name: {"at_alpha": _at_alpha(system, pairs, rejections, anchors.users, drawn)}
            | _orders(system, pairs, thin, drawn)
            for name, system in systems.items()
        },
        "curves": {name: _curve(system.scores, pairs, drawn) for name, system in systems.items() if name not in PARTS},
        "against": {
            name: _against(ours, system, pairs, thin, drawn)
            for name, system in systems.items()
            if ours is not None and name != OURS
        },
    }


def thin_pairs(world: World, pairs: Pairs) -> dict[str, np.ndarray]:
    """Label -> which pairs (N,) are those of items, or of users, of which little is counted."""
    shown = np.bincount(world.past.items, minlength=pairs.items.max(initial=-1) + 1)
    events = (world.served.ends - world.served.starts)[pairs.users]
    return {
        f"items shown fewer than {FEW_SHOWN} times": shown[pairs.items] < FEW_SHOWN,
        f"users with fewer than {FEW_EVENTS} events": events < FEW_EVENTS,
    }


def _at_alpha(system: Published, pairs: Pairs, rejections: np.ndarray, users: np.ndarray, drawn: Any) -> dict[str, Any]:
    """The lists at each calibrated alpha, ascending. Shape: rejections and users (U,) of the lists."""
    found: dict[str, Any] = {}
    served = system.calibration
    for one in sorted((served, *served.others), key=lambda one: one.alpha) if served is not None else ():
        label, limits = f"{one.alpha:g}", one.thresholds(rejections)
        figures = at_threshold(system.at_alpha[label], pairs, limits[pairs.users], **drawn)
        found[label] = figures | {"length": list_lengths(system.lengths[label], users, **drawn)}
    return found


def _orders(system: Published, pairs: Pairs, thin: Mapping[str, np.ndarray], drawn: Any) -> dict[str, Any]:
    """How well a system orders what is shown."""
    return {
        "catch_at": {f"{share:g}": one for share, one in catch_at(system.scores, pairs, **drawn).items()},
        "auc": auc(system.odds, pairs, **drawn),
        "within_user_auc": within_user_auc(system.odds, pairs, **drawn),
        "thin": {label: auc(system.odds[mask], pairs.where(mask), **drawn) for label, mask in thin.items()},
    }


def _curve(scores: np.ndarray, pairs: Pairs, drawn: Any) -> dict[str, list[float]]:
    curve = catch_curve(scores, pairs, FALSE_BLOCKS, **drawn)
    return {"false_block": FALSE_BLOCKS.tolist()} | {end: values.tolist() for end, values in curve.items()}


def _against(
    ours: Published, system: Published, pairs: Pairs, thin: Mapping[str, np.ndarray], drawn: Any
) -> dict[str, Any]:
    """Ours beside another system, on the same resamples."""
    lists = paired(ours.scores, system.scores, pairs, **drawn)
    everywhere = paired(ours.odds, system.odds, pairs, **drawn)
    return {
        "auc_difference": everywhere.auc_difference,
        "within_user_auc_difference": everywhere.within_user_auc_difference,
        "catch_ratio": {f"{share:g}": figure for share, figure in lists.catch_ratio.items()},
        "catch_difference": {f"{share:g}": figure for share, figure in lists.catch_difference.items()},
        "thin": {
            label: paired(ours.odds[mask], system.odds[mask], pairs.where(mask), **drawn).auc_difference
            for label, mask in thin.items()
        },
    }
