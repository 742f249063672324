"""How much of what users reject next lies in what they rejected before: the reach of a model of lasting interests.

    shares = target_coverage(events, anchors, neighbours, catalogue.semantic_ids[:, 0])["shares"]
    shares["window"]["top 4"]        # {"value": .41, "low": .39, "high": .43}

The negative interests of a user are the first-level codes of the items that the user rejected within the look-back,
each rejection weighing half as much a half-life earlier. A target (the next negative, all rejections of the window,
or these and their Swing neighbours) is covered when one of its items has one of the user's strongest codes.

Invariant: interests read nothing after the anchor. A larger target is covered more often by chance too: the gain
from one target to the next is a ceiling, not a merit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from conrec import ragged
from conrec.config import DAY_US
from conrec.evaluation.metrics import summarise
from conrec.feedback.events import REJECTED
from conrec.feedback.targets import ground_truth_sets, targets
from conrec.ragged import Ragged, pairs, ranges

if TYPE_CHECKING:
    from conrec.feedback.anchors import Anchors
    from conrec.feedback.events import Events
    from conrec.feedback.swing import Neighbours

TARGETS = ("next negative", "window", "window and neighbours")
"""What is asked to be covered, from the smallest set of items to the largest."""


def target_coverage(
    events: Events,
    anchors: Anchors,
    neighbours: Neighbours,
    first_codes: np.ndarray,
    lookback_days: float = 60.0,
    half_life_days: float = 14.0,
    tops: Sequence[int] = (1, 4),
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Share of the anchors whose target holds an item of one of the user's strongest negative interests.

    Shape: first_codes (I,) first-level code of each item. Returns lookback_days, half_life_days and shares:
    target -> "top 1" -> figure, its interval a bootstrap by user. An anchor without a rejection in the window has no
    target and does not count; one without interests covers nothing. Items that the user likes in the window are no
    neighbours.
    """
    foretold = targets(events, anchors)
    following = foretold.next_negative >= 0
    sets = (
        Ragged.from_lengths(foretold.next_negative[following], following.astype(np.int64)),
        foretold.future_negatives,
        ground_truth_sets(foretold, neighbours, 1.0)[0],
    )
    values = {}
    for top in tops:
        interests = negative_interests(events, anchors, first_codes, lookback_days, half_life_days, top)
        for target, items in zip(TARGETS, sets, strict=True):
            values[f"{target}, top {top}"] = _covered(items, interests, first_codes)
    figures = summarise(values, anchors.users, resamples, seed)
    return {
        "lookback_days": lookback_days,
        "half_life_days": half_life_days,
        "shares": {target: {f"top {top}": figures[f"{target}, top {top}"] for top in tops} for target in TARGETS},
    }


def negative_interests(
    events: Events, anchors: Anchors, first_codes: np.ndarray, lookback_days: float, half_life_days: float, top: int
) -> Ragged:
    """The `top` strongest codes of each anchor's user, strongest first; ties go to the lower code.

    Shape: A rows of codes, fewer than `top` where the user rejected items of fewer codes.
    """
    lengths = anchors.ends - anchors.starts
    places = ranges(anchors.starts, lengths)
    rows = np.repeat(np.arange(len(anchors)), lengths)
    ages = (anchors.times[rows] - events.times[places]) / DAY_US
    counted = (events.kinds[places] == REJECTED) & (ages <= lookback_days)
    rows, places, ages = rows[counted], places[counted], ages[counted]

    width = int(first_codes.max(initial=0)) + 1
    keys, group = np.unique(pairs(rows, first_codes[events.items[places]], width), return_inverse=True)
    weights = np.bincount(group, 0.5 ** (ages / half_life_days), minlength=len(keys))
    rows, codes = np.divmod(keys, width)
    strongest = np.lexsort((codes, -weights, rows))
    per_anchor = np.bincount(rows, minlength=len(anchors))
    rank = ragged.places(per_anchor)
    return Ragged.from_lengths(codes[strongest][rank < top], np.minimum(per_anchor, top))


def _covered(items: Ragged, interests: Ragged, first_codes: np.ndarray) -> np.ndarray:
    """1 where an item of the row has a code of the row's interests, 0 where none has, NaN in an empty row; (A,)."""
    width = int(first_codes.max(initial=0)) + 1
    hits = np.isin(pairs(items.rows, first_codes[items.values], width), pairs(interests.rows, interests.values, width))
    covered = np.bincount(items.rows[hits], minlength=len(items)) > 0
    return np.where(items.lengths > 0, covered, np.nan)
