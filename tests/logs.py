"""A random log over a small catalogue in which much is unusual: users without a past, items that nobody met, items that
are gone, IDs of one item and of many, events after the moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from conrec.blocklist.counts import Counts, Things
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, Linear, Score
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.feedback.events import Events

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
USERS, ITEMS, CODES, LEVELS = 24, 40, 3, 3


@dataclass(frozen=True)
class Log:
    """Shape: semantic_ids (I, L); live (I,) bool."""

    events: Events
    semantic_ids: np.ndarray
    live: np.ndarray
    trie: Trie
    codebook: Codebook
    things: Things

    @property
    def item_ids(self) -> pa.Array:
        return pa.array([f"item{item:02d}" for item in range(len(self.live))])

    def counts(self, now=NOW) -> Counts:
        return Counts.at(self.events, now, self.things)


def assert_same_of_things(found: Counts, wanted: Counts) -> None:
    """All that is counted of things, to the bit."""
    assert (found.now_us, found.mean) == (wanted.now_us, wanted.mean)
    assert found.of_things.keys() == wanted.of_things.keys()
    pairs = [(found.of_things[name], values) for name, values in wanted.of_things.items()]
    pairs += [(getattr(found.ease, name), getattr(wanted.ease, name)) for name in ("count", "columns", "weights")]
    pairs += [(getattr(found.spread, name), getattr(wanted.spread, name)) for name in ("order", "starts", "sources")]
    for one, other in [*pairs, (found.odds, wanted.odds)]:
        assert np.array_equal(one, other)


def events_of(histories: list[list[tuple[int, int, int]]]) -> Events:
    """From rows of (item, microseconds, kind) a user."""
    ordered = [sorted(rows, key=lambda event: (event[1], event[0], event[2])) for rows in histories]
    flat = np.array([event for rows in ordered for event in rows], np.int64).reshape(-1, 3)
    return Events(
        users=pa.array([f"user{number:02d}" for number in range(len(histories))], pa.string()),
        offsets=np.concatenate(([0], np.cumsum([len(rows) for rows in ordered]))).astype(np.int64),
        items=flat[:, 0].astype(np.int32),
        times=flat[:, 1],
        kinds=flat[:, 2].astype(np.int8),
    )


def random_log(seed: int, after: bool = True) -> Log:
    """A twentieth of the events lie at the very moment, a quarter after it; without `after` these are left out."""
    rng = np.random.default_rng(seed)
    distinct = np.stack(np.unravel_index(rng.permutation(CODES**LEVELS)[:17], (CODES,) * LEVELS), axis=1)
    semantic_ids = distinct[rng.integers(0, len(distinct), ITEMS)]
    live = rng.random(ITEMS) > 0.15
    trie = Trie.of_live(semantic_ids, CODES, live)
    codewords = rng.normal(size=(LEVELS, CODES, 5)).astype(np.float32) * np.float32([1, 0.5, 0.2])[:, None, None]
    center = codewords[np.arange(LEVELS), semantic_ids].sum(axis=1).mean(axis=0)
    # The last items are met by nobody.
    popularity = np.append(rng.dirichlet(np.ones(ITEMS - 8)), np.zeros(8))
    # The category is one of the ID, the shop one of the item alone.
    attributes = {"category": semantic_ids[:, 0] + semantic_ids[:, 1], "shop": rng.integers(0, 3, ITEMS)}
    histories = []
    for user in range(USERS):
        length = 0 if user == 5 else int(rng.integers(1, 25))
        days = np.where(rng.random(length) < 0.05, 0, rng.uniform(-5, 15, length))
        rejects = rng.uniform(0.1, 0.6)
        kinds = rng.choice(3, length, p=[rejects, 0.7 - rejects, 0.3])
        items = rng.choice(ITEMS, length, p=popularity)
        times = NOW - np.round(days * DAY).astype(np.int64)
        rows = list(zip(items.tolist(), times.tolist(), kinds.tolist(), strict=True))
        histories.append([row for row in rows if after or row[1] <= NOW])
    things = Things.of(semantic_ids, trie, attributes)
    return Log(events_of(histories), semantic_ids, live, trie, Codebook(codewords, center), things)


def random_score(rng: np.random.Generator, counts: Counts, reach: float = 0.3) -> Score:
    """Every column has a weight."""

    def linear(names):
        return Linear({name: float(rng.normal(0, 0.5)) for name in names}, float(rng.normal()))

    odds, exposure = counts.odds_names, counts.exposure_names
    return Score(
        Estimate(linear(odds), linear(exposure)),
        Estimate(linear((*odds, LOG_PROB, VERDICT)), linear((*exposure, LOG_PROB))),
        reach,
    )


def random_asked(rng: np.random.Generator, users: int, leaves: int, width: int = 5) -> Answers:
    """Some users are told of nothing."""
    rows = [rng.permutation(leaves)[: rng.integers(0, width)] for _ in range(users)]
    dense = np.full((users, width), -1, np.int64)
    for row, found in enumerate(rows):
        dense[row, : len(found)] = found
    log_probs = -np.sort(rng.exponential(2, (users, width))).astype(np.float32)
    return Answers.of_dense(dense, log_probs, rng.normal(0, 1, (users, width)).astype(np.float32))
