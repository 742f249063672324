"""What no blocklist may do, whatever was predicted, as array operations over a block of users.

    known = facts(events, users, watermark_us, item_count, settings)
    admitted = admit(predicted, known, settings)             # first pass: count the admitted pairs per item
    held = held_back(counts, predicted_users, settings)
    rows = select(admitted, known, held, watermark_us, settings)

The rules, in the order in which they decide:

1. The allow-list always wins: an item that the user liked within protect_days is not blocked, neither predicted nor
   because the user also rejected it, before or after. Where both were said of one item, showing it costs a glance,
   hiding what is loved costs trust; and the like must run out of its days before the rejection counts.
2. An explicit rejection blocks its item until explicit_days after the latest rejection, then demotes it for
   explicit_demote_days; one that is past is left out.
3. A user with fewer than min_negatives rejections, or min_history items, gets nothing predicted.
4. An item both rejected and predicted is one row, the explicit one: what was said outweighs what is guessed.
5. An item predicted for more than max_user_share of the night's users is held back for all of them. It is counted
   before the caps below: a row that they drop makes room for another item, whose share stays within the limit too.
6. At most max_items_per_user rows and max_catalogue_share of the catalogue: the newest rejections, then by score.

Invariant: every published row passes `select`. The threshold is calibrated on lists that passed it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conrec import ragged
from conrec.blocklist.resolve import Predicted
from conrec.config import DAY_US
from conrec.errors import ConfigError
from conrec.feedback.events import LIKED, REJECTED
from conrec.ragged import pairs, ranges

if TYPE_CHECKING:
    from conrec.config import GuardrailSettings
    from conrec.feedback.events import Events

# .29 * 100 is 28.999999999999996.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Facts:
    """What the users of a block said until the watermark.

    Shape: live_count, items that can be shown; rejections (B,) int64, rejections in the history; met (B,) int64,
    distinct items in it; protected (P,) int64 ascending, `ragged.pairs` of a row of the block and an item row that may
    not be blocked; explicit (E,) int64 ascending, pairs that the user rejected, with the time of the latest rejection
    in explicit_times (E,) int64 us: neither protected nor past; allowed: how many rejections the allow-list overruled.
    """

    item_count: int
    live_count: int
    rejections: np.ndarray
    met: np.ndarray
    protected: np.ndarray
    explicit: np.ndarray
    explicit_times: np.ndarray
    allowed: int


@dataclass(frozen=True)
class Rows:
    """The rows of a block that are published, sorted by user, then explicit first, then by rank.

    Shape: all (N,). rows int64, position of the user in the block; items int32; explicit bool; similarities and scores
    float32 (1 for explicit rows, scores of the others below 1); leaves int64, -1 for explicit rows; demotes_us int64,
    until when a row blocks; expires_us int64, until when it demotes.
    """

    rows: np.ndarray
    items: np.ndarray
    explicit: np.ndarray
    similarities: np.ndarray
    scores: np.ndarray
    leaves: np.ndarray
    demotes_us: np.ndarray
    expires_us: np.ndarray


def facts(
    events: Events,
    users: np.ndarray,
    watermark_us: int,
    item_count: int,
    settings: GuardrailSettings,
    live: np.ndarray | None = None,
) -> Facts:
    """What the events until the watermark say of a block of users.

    Shape: users (B,) rows of `events.users`; live (item_count,) bool, items that can be shown (None: all). A rejection
    of one that cannot counts as a rejection, and blocks nothing.
    """
    lengths = np.diff(events.offsets)[users]
    places = ranges(events.offsets[users], lengths)
    rows = np.repeat(np.arange(len(users)), lengths)
    past = events.times[places] <= watermark_us
    places, rows = places[past], rows[past]
    history = pairs(rows, events.items[places], item_count)
    times, kinds = events.times[places], events.kinds[places]

    liked = (kinds == LIKED) & (times >= watermark_us - _days_us(settings.protect_days))
    protected = np.unique(history[liked])
    rejected = kinds == REJECTED
    explicit, latest = _latest(history[rejected], times[rejected])
    lasting = latest + _days_us(settings.explicit_days) + _days_us(settings.explicit_demote_days) > watermark_us
    if live is not None:
        lasting &= live[explicit % item_count]
    explicit, latest = explicit[lasting], latest[lasting]
    overruled = np.isin(explicit, protected, assume_unique=True)
    return Facts(
        item_count=item_count,
        live_count=item_count if live is None else int(live.sum()),
        rejections=np.bincount(rows[rejected], minlength=len(users)),
        met=np.bincount(np.unique(history) // item_count, minlength=len(users)),
        protected=protected,
        explicit=explicit[~overruled],
        explicit_times=latest[~overruled],
        allowed=int(overruled.sum()),
    )


def admit(predicted: Predicted, known: Facts, settings: GuardrailSettings) -> Predicted:
    """The predictions that the rules on single users leave (1, 3 and 4 above)."""
    keys = pairs(predicted.rows, predicted.items, known.item_count)
    keep = enough_history(known, settings)[predicted.rows]
    # What users said is short and predictions, which ascend, are long: the short list is looked up in the long one.
    for stated in (known.protected, known.explicit):
        places = np.searchsorted(keys, stated)
        places[places == len(keys)] = 0
        keep[places[keys[places] == stated] if len(keys) else places[:0]] = False
    return predicted.take(keep)


def enough_history(known: Facts, settings: GuardrailSettings) -> np.ndarray:
    """Who may get predictions. Shape: (B,) bool."""
    return (known.rejections >= settings.min_negatives) & (known.met >= settings.min_history)


def held_back(counts: np.ndarray, predicted_users: int, settings: GuardrailSettings) -> np.ndarray:
    """Which items are predicted for too many users.

    Shape: counts (I,) users an item was admitted for; returns (I,) bool. `predicted_users`: users of the night with
    generated IDs.
    """
    return counts > settings.max_user_share * predicted_users + _ROUNDING


def longest_list(item_count: int, settings: GuardrailSettings) -> int:
    """The most rows a user may have."""
    return min(settings.max_items_per_user, int(settings.max_catalogue_share * item_count + _ROUNDING))


def require_room(item_count: int, settings: GuardrailSettings) -> None:
    """Raises `ConfigError` where no list may hold even one item: the night would publish nothing, for anybody."""
    if longest_list(item_count, settings) < 1:
        raise ConfigError(
            f"guardrails.max_catalogue_share = {settings.max_catalogue_share:g} of {item_count:,} items is less than "
            f"one item, so nothing could be blocked for anybody; write {math.ceil(100 / item_count) / 100:g} or more"
        )


def select(admitted: Predicted, known: Facts, held: np.ndarray, watermark_us: int, settings: GuardrailSettings) -> Rows:
    """The rows to publish. Shape: held (I,) bool from `held_back`."""
    cap = longest_list(known.live_count, settings)
    admitted = admitted.take(~held[admitted.items])

    # 1. Explicit rows, the newest rejection first, equals by item row.
    newest = np.lexsort((-known.explicit_times, known.explicit // known.item_count))
    explicit, times = known.explicit[newest], known.explicit_times[newest]
    first = ragged.places(np.bincount(explicit // known.item_count)) < cap
    explicit, times = explicit[first], times[first]
    spoken_for = np.bincount(explicit // known.item_count, minlength=len(known.rejections))

    # 2. Predicted rows by score, as far as there is room; a stable sort keeps equals by item row.
    best = np.argsort(pairs(admitted.rows, _descending(admitted.scores), 1 << 32), kind="stable")
    best = best[ragged.places(np.bincount(admitted.rows)) < (cap - spoken_for)[admitted.rows[best]]]
    admitted = admitted.take(best)

    # 3. Together, each user's explicit rows before the predicted ones.
    sizes = [len(explicit), len(admitted.rows)]
    rows = np.concatenate([explicit // known.item_count, admitted.rows])
    is_explicit = np.repeat([True, False], sizes)
    order = np.argsort(rows * 2 + ~is_explicit, kind="stable")
    ones = np.ones(len(explicit), np.float32)
    since = np.concatenate([times, np.full(len(admitted.rows), watermark_us)])
    demotes = since + np.where(is_explicit, _days_us(settings.explicit_days), _days_us(settings.predicted_days))
    expires = demotes + np.where(
        is_explicit, _days_us(settings.explicit_demote_days), _days_us(settings.predicted_demote_days)
    )
    return Rows(
        rows=rows[order],
        items=np.concatenate([explicit % known.item_count, admitted.items]).astype(np.int32)[order],
        explicit=is_explicit[order],
        similarities=np.concatenate([ones, admitted.similarities])[order],
        scores=np.concatenate([ones, admitted.scores])[order],
        leaves=np.concatenate([np.full(len(explicit), -1, np.int64), admitted.leaves])[order],
        demotes_us=demotes[order],
        expires_us=expires[order],
    )


def _descending(values: np.ndarray) -> np.ndarray:
    """Integers in [0, 2^32) that ascend as the float32 values descend."""
    bits = (values + np.float32(0)).view(np.uint32)  # + 0 makes -0 equal to 0
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (~ascending).astype(np.int64)


def _latest(keys: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs, ascending, with the largest time of each."""
    order = np.lexsort((times, keys))
    keys, times = keys[order], times[order]
    last = np.ones(len(keys), bool)
    last[:-1] = keys[1:] != keys[:-1]
    return keys[last], times[last]


def _days_us(days: float) -> int:
    return round(days * DAY_US)
