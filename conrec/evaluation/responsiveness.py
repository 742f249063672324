"""Does one more event move the list where it should? Served with the history as it is, and with an event more.

    figures = responsiveness(serve, events, anchors, targets, first_codes, categories, sample=1000, seed=0)
    figures["rejected"]["same code"]["newly blocked"]     # of what one more rejection blocks, share of its kind

The counterfactual simulation of arXiv 2308.12256: each user of a sample gets one event at the anchor, a rejection or a
like of the same probe item, and is served again. An item is newly blocked when only the second list has it, newly
unblocked when only the first has. A system that listens to a rejection blocks more items like the rejected one than
its list held before; one that listens to a like gives such items free.

Invariant: only the newest event of a history differs between two servings, so whatever differs between the lists is
its doing. The probe item itself counts in no share: blocking the very item that was rejected shows memory of an event,
not an answer in taste.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from conrec.evaluation.baselines import Histories
from conrec.evaluation.metrics import figure_of, members, require_distinct, resampled_means
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.ragged import Ragged, pairs

if TYPE_CHECKING:
    from conrec.feedback.targets import Targets

Serve = Callable[[Events, Anchors], np.ndarray]
"""The items that a system blocks for each anchor: (A, K) item rows, distinct in a row, -1 for none."""

_DRAWS = 64
"""Popular items tried for a user who was shown nothing without an opinion."""
_FIRST, _SECOND = "share in the first list", "share in the second list"


@dataclass(frozen=True)
class Probes:
    """The anchors that are served twice, and the item of the extra event.

    Shape: anchors (S,) int64 positions among all anchors, ascending; items (S,) int32 item rows; shown (S,) bool, the
    user was shown the item (where not, it is a popular one that the user never met).
    """

    anchors: np.ndarray
    items: np.ndarray
    shown: np.ndarray


def probes(events: Events, anchors: Anchors, sample: int, seed: int) -> Probes:
    """At most `sample` random anchors, no two of one user, and an item for each to reject or to like.

    The item is one that the user was shown up to the anchor and neither rejected nor liked, any of them with equal
    chance. A user who has none gets an item that the user never met, drawn by exposure (all users' events up to the
    anchor); who has met every one of 64 draws is left out. One item serves both kinds of event, so that the answers
    to a rejection and to a like differ by the kind alone. Deterministic.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(anchors))
    first = np.sort(np.unique(anchors.users[order], return_index=True)[1])
    chosen = np.sort(order[first[:sample]])
    sampled = anchors.take(chosen)

    histories = Histories.at(events, sampled)
    shown, judged = histories.distinct((SHOWN,)), histories.distinct((REJECTED, LIKED))
    width = int(events.items.max(initial=0)) + 1
    of_shown, of_judged = (pairs(part.rows, part.values, width) for part in (shown, judged))
    open_ = ~np.isin(of_shown, of_judged)
    unjudged = Ragged.from_rows(shown.rows[open_], shown.values[open_], len(sampled))
    has_shown = unjudged.lengths > 0
    items = np.full(len(sampled), -1, np.int32)
    place = unjudged.offsets[:-1] + (random.random(len(sampled)) * unjudged.lengths).astype(np.int64)
    items[has_shown] = unjudged.values[place[has_shown]]

    # An event drawn from those up to the anchor names its item: exposure up to then, without a table per anchor.
    by_time = np.argsort(events.times, kind="stable")
    until = np.searchsorted(events.times[by_time], sampled.times, side="right")
    drawn = (random.random((len(sampled), _DRAWS)) * until[:, None]).astype(np.int64)
    popular = events.items[by_time[drawn]] if len(events) else np.zeros((len(sampled), _DRAWS), np.int32)
    unmet = ~members(histories.distinct(), popular) & (until > 0)[:, None]
    rows = np.flatnonzero(~has_shown & unmet.any(axis=1))
    items[rows] = popular[rows, unmet[rows].argmax(axis=1)]
    kept = items >= 0
    return Probes(chosen[kept], items[kept], has_shown[kept])


def with_event(events: Events, anchors: Anchors, items: np.ndarray, kind: int) -> tuple[Events, Anchors]:
    """The events with one more for each anchor's user, the newest of the history, and the anchors among them.

    Shape: items (A,) item rows. The event has the anchor's time. Windows hold what they held.
    Raises ValueError when two anchors are of one user: the later would see the earlier one's event.
    """
    if len(np.unique(anchors.users)) < len(anchors):
        raise ValueError("two anchors are of one user, whose later one would see both events; give one anchor a user")
    order = np.argsort(anchors.users)
    users, places = anchors.users[order], anchors.ends[order]
    # Each event moves everything behind it by one place: later users by as many as there are anchors of users before.
    moved = np.searchsorted(users, np.arange(len(events.users) + 1))
    before = moved[anchors.users]
    extended = Events(
        events.users,
        events.offsets + moved,
        np.insert(events.items, places, items[order].astype(events.items.dtype)),
        np.insert(events.times, places, anchors.times[order]),
        np.insert(events.kinds, places, np.full(len(order), kind, events.kinds.dtype)),
    )
    return extended, Anchors(
        anchors.users,
        anchors.times,
        anchors.starts + before,
        anchors.ends + before + 1,
        anchors.window_ends + before + 1,
    )


def responsiveness(
    serve: Serve,
    events: Events,
    anchors: Anchors,
    targets: Targets,
    first_codes: np.ndarray,
    categories: np.ndarray | None,
    sample: int,
    seed: int,
    *,
    resamples: int = 1000,
) -> dict[str, Any]:
    """What one more rejection, and one more like, changes in what is blocked; three servings of the sample.

    Shape: first_codes (I,) first-level code of each item; categories (I,) int, or None where items have none. What
    `serve` leaves out (items of the history, say) is its own business.

    Returns anchors, how many were served; probes_shown, the share of them whose probe item was shown to the user;
    and for "rejected" and "liked", each a figure with its interval by user:
    - newly blocked, newly unblocked: items an anchor;
    - probe blocked before, probe blocked after: share of anchors whose list has the probe item;
    - same code, same category (left out without categories): `newly blocked` and `newly unblocked`, the share of
      them that has the probe item's code; `blocked before`, the same share of the first list, over the anchors where
      a rejection newly blocks (a like newly unblocks) something; `relative change`, the share in the second list over
      that in the first, less 1, over the anchors where both lists block something;
    - liked later: the share of `newly blocked` and of `newly unblocked` items that the user likes in the window.
    A share is the mean of the anchors' shares; an anchor without such items does not count.
    Raises ValueError when a served list repeats an item or there is not one per anchor.
    """
    probed = probes(events, anchors, sample, seed)
    sampled = anchors.take(probed.anchors)
    liked_later = targets.future_positives.take(probed.anchors)
    likeness = {"same code": first_codes} | ({} if categories is None else {"same category": categories})
    before = _checked(serve(events, sampled), len(sampled))
    result: dict[str, Any] = {
        "anchors": len(sampled),
        "probes_shown": float(probed.shown.mean()) if len(sampled) else np.nan,
    }
    for name, kind in (("rejected", REJECTED), ("liked", LIKED)):
        after = _checked(serve(*with_event(events, sampled, probed.items, kind)), len(sampled))
        values = _answers(before, after, probed.items, likeness, liked_later, kind)
        result[name] = _figures(values, sampled.users, resamples, seed)
    return result


def _answers(
    before: np.ndarray,
    after: np.ndarray,
    probe_items: np.ndarray,
    likeness: dict[str, np.ndarray],
    liked_later: Ragged,
    kind: int,
) -> dict[str, np.ndarray]:
    """Every measure of every anchor, NaN where undefined; "same code/newly blocked" is a share of a group."""
    is_probe = [items == probe_items[:, None] for items in (before, after)]
    others = [(items >= 0) & ~probe for items, probe in zip((before, after), is_probe, strict=True)]
    new = others[1] & ~members(_rows_of(before), after)
    gone = others[0] & ~members(_rows_of(after), before)
    values = {
        "newly blocked": new.sum(axis=1).astype(float),
        "newly unblocked": gone.sum(axis=1).astype(float),
        "probe blocked before": is_probe[0].any(axis=1).astype(float),
        "probe blocked after": is_probe[1].any(axis=1).astype(float),
    }
    moved = new.any(axis=1) if kind == REJECTED else gone.any(axis=1)
    for name, group in likeness.items():
        alike_before, alike_after = (group[items] == group[probe_items][:, None] for items in (before, after))
        share_before = _share(alike_before, others[0])
        values[f"{name}/newly blocked"] = _share(alike_after, new)
        values[f"{name}/newly unblocked"] = _share(alike_before, gone)
        values[f"{name}/blocked before"] = np.where(moved, share_before, np.nan)
        both = others[0].any(axis=1) & others[1].any(axis=1)
        values[f"{name}/{_FIRST}"] = np.where(both, share_before, np.nan)
        values[f"{name}/{_SECOND}"] = np.where(both, _share(alike_after, others[1]), np.nan)
    values["liked later/newly blocked"] = _share(members(liked_later, after), new)
    values["liked later/newly unblocked"] = _share(members(liked_later, before), gone)
    return values


def _share(hits: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Share of `among` that hits, NaN where a row has none. Shape: (A, K) bool each; returns (A,) float64."""
    count = among.sum(axis=1)
    return np.where(count > 0, (hits & among).sum(axis=1) / np.maximum(count, 1), np.nan)


def _figures(values: dict[str, np.ndarray], users: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    """Figures of all measures by group; the two lists' shares become one ratio, on the same resamples."""
    point, drawn = resampled_means(values, users, resamples, seed)
    result: dict[str, Any] = {}
    for name in values:
        group, _, measure = name.rpartition("/")
        figures = result.setdefault(group, {}) if group else result
        if measure == _FIRST:
            second = f"{group}/{_SECOND}"
            with np.errstate(divide="ignore", invalid="ignore"):
                ratios = np.append(drawn[second], point[second]) / np.append(drawn[name], point[name]) - 1
            figures["relative change"] = figure_of(ratios[-1], ratios[:-1])
        elif measure != _SECOND:
            figures[measure] = figure_of(point[name], drawn[name])
    return result


def _checked(served: np.ndarray, count: int) -> np.ndarray:
    """The lists, if they are one per anchor without repeats."""
    if served.ndim != 2 or len(served) != count:
        raise ValueError(f"serve returned an array of shape {served.shape} for {count} anchors; return one row each")
    require_distinct(served)
    return served


def _rows_of(items: np.ndarray) -> Ragged:
    """Dense (A, K) items, -1 for none, as rows without the padding."""
    real = items >= 0
    return Ragged.from_lengths(items[real], real.sum(axis=1))
