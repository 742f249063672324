"""What is counted of the log until a moment: the columns of a score beside what the policy says.

    counts = Counts.at(events, now_us, Things.of(semantic_ids, trie, attributes))
    counts = Counts.over(log, now_us, things).among(log.of_bucket(0, 8))     # the same of a bucket's users
    columns = counts.columns(users, things)          # name -> (N,), for pairs
    counts.crossed["category"].dense(users)          # (B, keys), for every key at once

A `thing` is what can be blocked: an item (rows 0 to I - 1), or behind them an item of each semantic ID that nobody has
met yet (rows I to I + M - 1), which is what the published rules speak of. So an item that appears during the day has
the score of the rule for its ID.

- of things: `rejected` and `liked`, log shares of the users who met it, drawn level by level from its prefixes';
  `<attribute>`, log odds of the attribute's value; `shown`, how many met it; `fresh`, how much more it is shown lately.
- of users: `leaning`, log odds that they reject; `events`; `excess`, how far they reject beyond what they were shown.
- crossed: `user x <attribute>` and `user x prefix`, how far a user's odds there lie from the user's odds.
- `expected`: log of the exposure that EASE expects.

Invariant: only events until `now_us` are counted. What few met is drawn towards what is alike, so a column is finite
for every user and thing, and 0 in a crossed one where the user said nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from conrec import ragged
from conrec.catalogue.items import Catalogue
from conrec.catalogue.trie import Trie
from conrec.config import DAY_US
from conrec.feedback.ease import Ease, most_met, together
from conrec.feedback.events import LIKED, REJECTED, Events
from conrec.feedback.histories import users_of
from conrec.feedback.log import gathered
from conrec.parallel import Mapped, in_process, mapping

ODDS_PRIOR = 20
"""Users with the shares of what is above, added to every prefix, item and attribute: what few met says little."""
USER_PRIOR = 2
"""Answers of the mean user added to a user's."""
FRESH_DAYS = 1.0
"""What counts as recent exposure."""
FRESH_PRIOR = 5
"""Exposures added to recent and expected exposure."""
EASE_RIDGE = 200.0
EASE_ITEMS = 8192
"""Only so many items, the most met, take part in EASE (two matrices of 256 MiB)."""
EASE_LEAST = 1e-3
"""Added to what EASE expects, which is 0 or less for most items."""

EVENTS_AT_ONCE = 1 << 20
"""Events of whole buckets that are counted together: what is added up of each grows far less than they do."""
SECONDS_AN_EVENT = 1e-6
"""Of one core, for what is counted of the log (`benchmarks/scale.py`)."""
SCORES_AT_ONCE = 1 << 22
"""Scores that are held at once, of a block of users and all things."""
PREFIX = "prefix"
"""Name of the crossed column of the first code, which stands beside those of the attributes."""
EXPECTED = "expected"


@dataclass(frozen=True)
class Things:
    """What can be blocked, T = I + M of them.

    Shape: prefixes: L arrays (T,) int64, the number of each thing's prefix of each length; attributes: name -> (T,)
    int64 values; leaves (T,) int64, -1 for an item whose ID no live item has.
    """

    item_count: int
    prefixes: tuple[np.ndarray, ...]
    attributes: Mapping[str, np.ndarray]
    leaves: np.ndarray

    @classmethod
    def of(cls, semantic_ids: np.ndarray, trie: Trie, attributes: Mapping[str, np.ndarray]) -> Things:
        """Of the catalogue's items and trie; an unseen item has the attributes of the first item of its ID.

        Shape: semantic_ids (I, L); attributes: name -> (I,) integers from 0.
        """
        codes = np.concatenate([semantic_ids, trie.semantic_ids]).astype(np.int64)
        prefixes: list[np.ndarray] = []
        above = np.zeros(len(codes), np.int64)
        for level in codes.T:
            above = np.unique(above * trie.codes + level, return_inverse=True)[1].ravel()
            prefixes.append(above)
        first = trie.leaf_items.values[trie.leaf_items.offsets[:-1]]
        return cls(
            len(semantic_ids),
            tuple(prefixes),
            {name: np.concatenate([values, values[first]]) for name, values in attributes.items()},
            np.concatenate([trie.item_leaves.astype(np.int64), np.arange(len(trie))]),
        )

    def __len__(self) -> int:
        return len(self.leaves)


@dataclass(frozen=True)
class Crossed:
    """How far each user's odds of rejecting lie from the user's own where a key holds.

    Shape: keys (T,) int64 key of each thing; rejected and liked (U, K) counts; shares (U,) the user's share of
    rejections among answers.
    """

    keys: np.ndarray
    rejected: sparse.csr_array
    liked: sparse.csr_array
    shares: np.ndarray

    def dense(self, users: np.ndarray) -> np.ndarray:
        """Shape: users (B,) -> (B, K) float32."""
        return self._odds(self.rejected[users].toarray(), self.liked[users].toarray(), self.shares[users][:, None])

    def of(self, users: np.ndarray, things: np.ndarray) -> np.ndarray:
        """Of pairs. Shape: (N,) each -> (N,) float32."""
        keys = self.keys[things]
        rejected, liked = (_at(counts, users, keys) for counts in (self.rejected, self.liked))
        return self._odds(rejected, liked, self.shares[users])

    @staticmethod
    def _odds(rejected: np.ndarray, liked: np.ndarray, shares: np.ndarray) -> np.ndarray:
        here = np.log(rejected + USER_PRIOR * shares) - np.log(liked + USER_PRIOR * (1 - shares))
        return (here - np.log(shares / (1 - shares))).astype(np.float32)


@dataclass(frozen=True)
class Spread:
    """How EASE's columns become things: each takes its own, or where nobody met it, the mean over those of its ID.

    Shape: order (C,) EASE's columns by leaf, those without one last; starts (G,) where each leaf begins in it, and
    behind them the end; sources (T,) where a thing stands behind each other in columns, means of leaves, and a zero.
    """

    order: np.ndarray
    starts: np.ndarray
    sources: np.ndarray

    @classmethod
    def of(cls, columns: np.ndarray, seen: np.ndarray, things: Things) -> Spread:
        """Shape: columns (C,) item rows, seen (T,) bool."""
        leaves = things.leaves[columns]
        order = np.argsort(np.where(leaves < 0, len(things), leaves), kind="stable")
        groups, starts = np.unique(leaves[order][: np.count_nonzero(leaves >= 0)], return_index=True)
        sources = np.full(len(things), len(columns) + len(groups))
        place = np.minimum(np.searchsorted(groups, things.leaves), max(len(groups) - 1, 0))
        alike = ~seen & (things.leaves >= 0)
        alike &= groups[place] == things.leaves if len(groups) else False
        sources[alike] = len(columns) + place[alike]
        sources[columns] = np.arange(len(columns))
        return cls(order, np.append(starts, np.count_nonzero(leaves >= 0)), sources)

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Shape: (B, C) -> (B, T)."""
        parts = [scores]
        if len(self.starts) > 1:
            with_leaf = scores[:, self.order[: self.starts[-1]]]
            parts.append(np.add.reduceat(with_leaf, self.starts[:-1], axis=1) / np.diff(self.starts).astype(np.float32))
        parts.append(np.zeros((len(scores), 1), np.float32))
        return np.concatenate(parts, axis=1)[:, self.sources]


@dataclass(frozen=True)
class Counts:
    """The columns at a moment.

    Shape: of_things: name -> (T,) float32; of_users: name -> (U,) float32; met (U, I) 0/1, items of each history.
    """

    things: Things
    now_us: int
    of_things: Mapping[str, np.ndarray]
    of_users: Mapping[str, np.ndarray]
    crossed: Mapping[str, Crossed]
    met: sparse.csr_array
    ease: Ease
    spread: Spread
    mean: float
    """Share of rejections among the answers of all users."""
    odds: np.ndarray
    """Shape: (T,) share of rejections that a thing's answers have."""

    @classmethod
    def at(cls, events: Events, now_us: int, things: Things) -> Counts:
        """Counts what is known at a moment, for all users. Memory is that of the log and of EASE."""
        return cls.over([events], now_us, things).among(events)

    @classmethod
    def over(
        cls,
        log: Iterable[Events],
        now_us: int,
        things: Things,
        mapped: Mapped = in_process,
    ) -> Counts:
        """What `at` counts of things, with the columns of no user yet (see `among`). Memory is that of a bucket, or of
        EVENTS_AT_ONCE, and of EASE.

        `log` gives the events bucket by bucket, no user in two of them; it is read twice, since who met what decides
        which items take part in EASE. `mapped` does what is done of the buckets: here it is added up, piece by piece.
        """
        sums, pieces = _Sums.of_nobody(things.item_count), 0
        when = (things.item_count, now_us)
        with closing(mapped(_summed, when, gathered(log, EVENTS_AT_ONCE), "pieces of the log", None)) as parts:
            for part in parts:
                sums.add(part)
                pieces += 1
        # Nobody has met the things behind the items.
        seen, rejecting, liking, recent = np.pad(sums.items, ((0, 0), (0, len(things) - things.item_count)))
        by_kind = {REJECTED: rejecting, LIKED: liking}
        chain = (*things.prefixes, np.arange(len(things)))
        shares = {kind: _shares(saying, seen, chain) for kind, saying in by_kind.items()}
        of_things = {"rejected": np.log(shares[REJECTED]), "liked": np.log(shares[LIKED])}
        for name, values in things.attributes.items():
            rejected, liked = (_shares(by_kind[kind], seen, (values,)) for kind in (REJECTED, LIKED))
            of_things[name] = np.log(rejected / liked)
        expected = seen * recent.sum() / max(seen.sum(), 1)
        # What nobody met yet is shown as those of its ID are.
        for name, values in {
            "shown": np.log(seen + 0.5),
            "fresh": np.log((recent + FRESH_PRIOR) / (expected + FRESH_PRIOR)),
        }.items():
            of_things[name] = _of_alike(values, seen > 0, things)
        columns = most_met(seen[: things.item_count], EASE_ITEMS)
        shared = (columns, things.item_count, now_us)
        again = gathered(log, EVENTS_AT_ONCE)
        with closing(mapped(_met_together, shared, again, "pieces of the log for EASE", pieces)) as products:
            ease = Ease.of_products(products, columns, things.item_count, EASE_RIDGE)
        return cls(
            things,
            now_us,
            {name: values.astype(np.float32) for name, values in of_things.items()},
            {},
            {},
            sparse.csr_array((0, things.item_count), dtype=np.float32),
            ease,
            Spread.of(ease.columns, seen > 0, things),
            _rejecting(sums.answers),
            shares[REJECTED] / (shares[REJECTED] + shares[LIKED]),
        )

    def later(self, events: Events, now_us: int) -> Counts:
        """The same of things, and by EASE, with the columns that users have at a later moment: a score of this moment
        that is asked then, after a longer history. `events` are all that everybody did."""
        return replace(self, now_us=now_us, mean=_rejecting(_answers(events.kinds[events.times <= now_us]))).among(
            events
        )

    def among(self, events: Events) -> Counts:
        """The same of things, with the columns of these users; `events` are all that they did."""
        known = events.times <= self.now_us
        users, items, kinds = events.rows[known], events.items[known], events.kinds[known]
        rejections, likes = (np.bincount(users, kinds == kind, len(events.users)) for kind in (REJECTED, LIKED))
        answers = rejections + likes
        shares = (rejections + USER_PRIOR * self.mean) / (answers + USER_PRIOR)
        # Of what was met, how much would the mean user have rejected?
        answered = np.isin(kinds, (REJECTED, LIKED))
        due = np.bincount(users[answered], self.odds[items[answered]], len(events.users))
        of_users = {
            "leaning": np.log(shares / (1 - shares)),
            "events": np.log1p(np.bincount(users, minlength=len(events.users))),
            "excess": np.log((rejections + USER_PRIOR) / (due + USER_PRIOR))
            - np.log((likes + USER_PRIOR) / (answers - due + USER_PRIOR)),
        }
        keys = {PREFIX: self.things.prefixes[0], **self.things.attributes}
        return replace(
            self,
            of_users={name: values.astype(np.float32) for name, values in of_users.items()},
            crossed={
                f"user x {name}": Crossed(
                    values,
                    _counted(users[kinds == REJECTED], values[items[kinds == REJECTED]], values, len(events.users)),
                    _counted(users[kinds == LIKED], values[items[kinds == LIKED]], values, len(events.users)),
                    shares,
                )
                for name, values in keys.items()
            },
            met=_met(users, items, len(events.users), self.things.item_count),
        )

    @property
    def odds_names(self) -> tuple[str, ...]:
        """Columns that tell a rejection from a like."""
        told = (name for name in self.of_things if name not in ("shown", "fresh"))
        return (*told, *self.of_users, *self.crossed)

    @property
    def exposure_names(self) -> tuple[str, ...]:
        """Columns that tell what a user will be shown."""
        return ("shown", "fresh", EXPECTED)

    def expected(self, users: np.ndarray) -> np.ndarray:
        """log of the exposure that EASE expects. Shape: users (B,) -> (B, T) float32."""
        expected = self.spread(np.asarray(self.met[users][:, self.ease.columns] @ self.ease.weights, np.float32))
        np.maximum(expected, 0, out=expected)
        expected += np.float32(EASE_LEAST)
        return np.log(expected, out=expected)

    def columns(
        self, users: np.ndarray, things: np.ndarray, expected: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Every column of pairs; `expected` of them where it is known already.

        Shape: users and things (N,) rows -> (N,) float32 each.
        """
        columns = {name: values[things] for name, values in self.of_things.items()}
        columns |= {name: values[users] for name, values in self.of_users.items()}
        columns |= {name: crossed.of(users, things) for name, crossed in self.crossed.items()}
        columns[EXPECTED] = self._expected_of(users, things) if expected is None else expected
        return columns

    def has_met(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether the user's history holds the item. Shape: (N,) each -> (N,) bool."""
        return _at(self.met, users, items) > 0

    def _expected_of(self, users: np.ndarray, things: np.ndarray) -> np.ndarray:
        values = np.empty(len(users), np.float32)
        distinct, place = np.unique(users, return_inverse=True)
        order = np.argsort(place, kind="stable")
        borders = np.searchsorted(place[order], np.arange(0, len(distinct) + self.block, self.block))
        for start, (first, last) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
            block = distinct[start * self.block : (start + 1) * self.block]
            which = order[first:last]
            values[which] = self.expected(block)[place[which] - start * self.block, things[which]]
        return values

    @property
    def block(self) -> int:
        """Users whose scores of all things are held at once."""
        return max(1, SCORES_AT_ONCE // len(self.things))


@dataclass(frozen=True)
class _Sums:
    """What users said of items until a moment, and how often they answered.

    Shape: items (4, I) int64: who met each, who rejected and who liked it, exposures of the last day; answers (2,)
    int64, rejections and likes.
    """

    items: np.ndarray
    answers: np.ndarray

    @classmethod
    def of_nobody(cls, item_count: int) -> _Sums:
        return cls(np.zeros((4, item_count), np.int64), np.zeros(2, np.int64))

    def add(self, other: _Sums) -> None:
        """Adds what was counted of other users."""
        np.add(self.items, other.items, out=self.items)
        np.add(self.answers, other.answers, out=self.answers)


def _summed(when: tuple[int, int], buckets: Iterable[Events]) -> _Sums:
    """What the users of some buckets said, a task; `when`: the number of items, and the moment."""
    item_count, now_us = when
    sums = _Sums.of_nobody(item_count)
    for events in buckets:
        past = events.times <= now_us
        users, items, kinds = events.rows[past], events.items[past], events.kinds[past]
        recent = events.times[past] > now_us - round(FRESH_DAYS * DAY_US)
        said = (users_of(users[kinds == kind], items[kinds == kind], item_count) for kind in (REJECTED, LIKED))
        met, lately = users_of(users, items, item_count), np.bincount(items[recent], minlength=item_count)
        sums.add(_Sums(np.stack([met, *said, lately]), _answers(kinds)))
    return sums


def _answers(kinds: np.ndarray) -> np.ndarray:
    """Rejections and likes among events (N,). Shape: (2,) int64."""
    return np.bincount(kinds, minlength=LIKED + 1)[[REJECTED, LIKED]]


def _rejecting(answers: np.ndarray) -> float:
    """Share of rejections among answers; (2,), rejections and likes."""
    return float((answers[0] + 1) / (answers.sum() + 2))


def _met_together(shared: tuple[np.ndarray, int, int], buckets: Iterable[Events]) -> sparse.csr_array:
    """What `ease.together` says of some buckets until a moment: a task, whose result has at most half of EASE's matrix.

    One product of them all: pairs that several buckets have are sent and added up once.
    """
    columns, item_count, now_us = shared
    met = []
    for events in buckets:
        past = events.times <= now_us
        met.append(_met(events.rows[past], events.items[past], len(events.users), item_count))
    return together(sparse.vstack(met, format="csr"), columns)


def _met(users: np.ndarray, items: np.ndarray, user_count: int, item_count: int) -> sparse.csr_array:
    met = np.unique(ragged.pairs(users, items, item_count))
    ones = np.ones(len(met), np.float32)
    return sparse.csr_array((ones, np.divmod(met, item_count)), shape=(user_count, item_count))


def _at(counts: sparse.csr_array, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Shape: (N,) each -> (N,)."""
    # Of no pairs, SciPy makes a sparse array.
    return np.asarray(counts[rows, columns]).ravel() if len(rows) else np.zeros(0, counts.dtype)


def _shares(saying: np.ndarray, met: np.ndarray, chain: tuple[np.ndarray, ...]) -> np.ndarray:
    """Share of the users who met a thing that say something of it, drawn level by level down the chain of keys.

    Shape: saying, met and every key (T,) -> (T,) float64, above 0.
    """
    share = np.full(len(met), (saying.sum() + 1) / (met.sum() + 3))
    for keys in chain:
        share = (np.bincount(keys, saying)[keys] + ODDS_PRIOR * share) / (np.bincount(keys, met)[keys] + ODDS_PRIOR)
    return share


def _counted(users: np.ndarray, keys: np.ndarray, all_keys: np.ndarray, user_count: int) -> sparse.csr_array:
    """How often each user has each key. Shape: (N,) each -> (user_count, K) float32."""
    shape = (user_count, int(all_keys.max(initial=0)) + 1)
    return sparse.csr_array(sparse.coo_array((np.ones(len(users), np.float32), (users, keys)), shape=shape))


def _of_alike(values: np.ndarray, seen: np.ndarray, things: Things) -> np.ndarray:
    """The values, that of a thing nobody met replaced by the mean over the seen things of its ID. Shape: (T,)."""
    known = seen & (things.leaves >= 0)
    count = len(things) - things.item_count
    met = np.bincount(things.leaves[known], minlength=count)
    mean = np.bincount(things.leaves[known], values[known], count) / np.maximum(met, 1)
    alike = ~seen & (things.leaves >= 0) & (met[things.leaves] > 0)
    return np.where(alike, mean[things.leaves], values)


def counting(events: int) -> Mapped:
    """How `Counts.over` is to do its work on a log of so many events."""
    return mapping(events * SECONDS_AN_EVENT)


def things_of(catalogue: Catalogue) -> Things:
    """What can be blocked, with its category where the items have one."""
    categories = catalogue.categories
    attributes = {} if categories is None else {"category": categories}
    return Things.of(catalogue.semantic_ids, catalogue.trie, attributes)
