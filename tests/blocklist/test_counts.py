"""Every counted column against slow loops over a small log, and nothing that lies after the moment in any of them."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import chain

import numpy as np
import pytest
from logs import DAY, ITEMS, NOW, USERS, assert_same_of_things, random_log

from conrec.blocklist import counts as module
from conrec.blocklist.counts import Counts, Things
from conrec.catalogue.trie import Trie
from conrec.feedback.events import LIKED, REJECTED, Events

EVERYONE = np.arange(USERS)
ATTRIBUTES = ("category", "shop")


class Loops:
    """All columns of all pairs, (U, T) each, by loops over the events."""

    def __init__(self, log, now=NOW, until=None, ease_items=10_000):
        self.log, self.things = log, range(len(log.things))
        rows = zip(log.events.rows, log.events.items, log.events.times, log.events.kinds, strict=True)
        events = [tuple(map(int, row)) for row in rows]
        self.past = [row for row in events if row[2] <= min(now, until or now)]
        self.known = [row for row in events if row[2] <= now]
        self.until = min(now, until or now)
        codes = [*log.semantic_ids.tolist(), *log.trie.semantic_ids.tolist()]
        leaf_of = {tuple(code): leaf for leaf, code in enumerate(log.trie.semantic_ids.tolist())}
        self.leaf = [leaf_of.get(tuple(code)) for code in codes]
        self.keys = {f"prefix{level}": [tuple(code[:level]) for code in codes] for level in (1, 2, 3)}
        self.keys["thing"] = list(self.things)
        for name in ATTRIBUTES:
            values = log.things.attributes[name][:ITEMS].tolist()
            first = [min(i for i in range(ITEMS) if log.live[i] and self.leaf[i] == m) for m in range(len(log.trie))]
            self.keys[name] = [*values, *(values[item] for item in first)]
        self.met = self.users_of(None)
        self.said = {kind: self.users_of(kind) for kind in (REJECTED, LIKED)}
        self.columns = self.of_things() | self.of_users() | self.crossed() | {"expected": self.expected(ease_items)}

    def users_of(self, kind):
        found = defaultdict(set)
        for user, item, _, said in self.past:
            if kind is None or said == kind:
                found[item].add(user)
        return [len(found[thing]) for thing in self.things]

    def share(self, kind, chain):
        """Of the users who met a thing, drawn down the chain: 20 users with the share of what is above."""
        shares = [(sum(self.said[kind]) + 1) / (sum(self.met) + 3)] * len(self.things)
        for name in chain:
            said, met = defaultdict(int), defaultdict(int)
            for thing in self.things:
                said[self.keys[name][thing]] += self.said[kind][thing]
                met[self.keys[name][thing]] += self.met[thing]
            shares = [
                (said[key] + 20 * share) / (met[key] + 20) for key, share in zip(self.keys[name], shares, strict=True)
            ]
        return shares

    def alike(self, values):
        found = list(values)
        for thing in self.things:
            same = [
                values[other]
                for other in self.things
                if self.met[other] and self.leaf[other] == self.leaf[thing] is not None
            ]
            if not self.met[thing] and same:
                found[thing] = sum(same) / len(same)
        return found

    def of_things(self):
        chain = ("prefix1", "prefix2", "prefix3", "thing")
        self.rejected, self.liked = (self.share(kind, chain) for kind in (REJECTED, LIKED))
        recent = [sum(i == thing and t > self.until - DAY for _, i, t, _ in self.past) for thing in self.things]
        rate = sum(recent) / sum(self.met)
        found = {
            "rejected": [math.log(share) for share in self.rejected],
            "liked": [math.log(share) for share in self.liked],
            "shown": self.alike([math.log(met + 0.5) for met in self.met]),
            "fresh": self.alike(
                [math.log((now + 5) / (rate * met + 5)) for now, met in zip(recent, self.met, strict=True)]
            ),
        }
        for name in ATTRIBUTES:
            shares = zip(*(self.share(kind, [name]) for kind in (REJECTED, LIKED)), strict=True)
            found[name] = [math.log(rejected / liked) for rejected, liked in shares]
        return {name: np.tile(values, (USERS, 1)) for name, values in found.items()}

    def of_users(self):
        rejections, likes = ([0] * USERS for _ in range(2))
        due, events = [0.0] * USERS, [0] * USERS
        for user, item, _, kind in self.known:
            events[user] += 1
            if kind in (REJECTED, LIKED):
                due[user] += self.rejected[item] / (self.rejected[item] + self.liked[item])
            rejections[user] += kind == REJECTED
            likes[user] += kind == LIKED
        mean = (sum(rejections) + 1) / (sum(rejections) + sum(likes) + 2)
        self.user_share = [(r + 2 * mean) / (r + k + 2) for r, k in zip(rejections, likes, strict=True)]
        found = {
            "leaning": [math.log(share / (1 - share)) for share in self.user_share],
            "events": [math.log(1 + count) for count in events],
            "excess": [
                math.log((r + 2) / (d + 2)) - math.log((k + 2) / (r + k - d + 2))
                for r, k, d in zip(rejections, likes, due, strict=True)
            ],
        }
        return {name: np.tile(np.array(values)[:, None], len(self.things)) for name, values in found.items()}

    def crossed(self):
        found = {}
        for name, by in {"prefix": "prefix1", "category": "category", "shop": "shop"}.items():
            column = np.zeros((USERS, len(self.things)))
            for user, share in enumerate(self.user_share):
                for thing in self.things:
                    said = [
                        kind
                        for u, item, _, kind in self.known
                        if u == user and self.keys[by][item] == self.keys[by][thing]
                    ]
                    rejected, liked = said.count(REJECTED) + 2 * share, said.count(LIKED) + 2 * (1 - share)
                    column[user, thing] = math.log(rejected / liked) - math.log(share / (1 - share))
            found[f"user x {name}"] = column
        return found

    def expected(self, ease_items):
        matrices = []
        for events in (self.past, self.known):
            matrix = np.zeros((USERS, ITEMS))
            for user, item, _, _ in events:
                matrix[user, item] = 1
            matrices.append(matrix)
        fitted, history = matrices
        most = sorted((item for item in range(ITEMS) if self.met[item]), key=lambda item: -self.met[item])[:ease_items]
        columns = sorted(most)
        inverse = np.linalg.inv(fitted[:, columns].T @ fitted[:, columns] + 200 * np.eye(len(columns)))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        scores = history[:, columns] @ weights
        found = np.zeros((USERS, len(self.things)))
        for thing in self.things:
            alike = [place for place, item in enumerate(columns) if self.leaf[item] == self.leaf[thing] is not None]
            if thing in columns:
                found[:, thing] = scores[:, columns.index(thing)]
            elif not self.met[thing] and alike:
                found[:, thing] = scores[:, alike].mean(axis=1)
        return np.log(np.maximum(found, 0) + 1e-3)


def every_pair(counts):
    """Every column of every pair, (U, T) each."""
    things = len(counts.things)
    columns = counts.columns(np.repeat(EVERYONE, things), np.tile(np.arange(things), USERS))
    return {name: values.reshape(USERS, things) for name, values in columns.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], values, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_every_column_equals_the_loops(seed):
    log = random_log(seed)
    loops = Loops(log)
    equal(every_pair(log.counts()), loops.columns)
    # The world holds what the loops are about.
    unseen = [thing for thing in range(ITEMS) if not loops.met[thing]]
    assert any(
        loops.leaf[thing] is not None and any(loops.met[i] for i in log.trie.leaf_items[loops.leaf[thing]])
        for thing in unseen
    )
    assert all(len(np.unique(values)) > 2 for values in loops.columns.values())


@pytest.mark.parametrize("seed", range(2))
def test_things_are_counted_until_their_own_moment_and_users_until_now(seed):
    log = random_log(seed)
    until = NOW - 6 * DAY
    before = log.counts(until)
    equal(every_pair(before.later(log.events, NOW)), Loops(log, until=until).columns)
    # And of no moment between: the same moment is no later one.
    same, then = every_pair(before.later(log.events, until)), every_pair(before)
    assert all(np.array_equal(same[name], then[name]) for name in then)


def test_items_beyond_the_most_met_are_expected_nowhere_and_speak_for_nobody(monkeypatch):
    monkeypatch.setattr(module, "EASE_ITEMS", 6)
    log = random_log(1)
    counts, loops = log.counts(), Loops(log, ease_items=6)
    assert len(counts.ease.columns) == 6 < sum(map(bool, loops.met))
    np.testing.assert_allclose(counts.expected(EVERYONE), loops.columns["expected"], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_what_lies_after_the_moment_changes_nothing(seed):
    """The log with events planted after it, of every kind, on items that nobody had met, and the log without."""
    log, before = random_log(seed), random_log(seed, after=False)
    rng = np.random.default_rng(seed)
    rows = [
        *zip(before.events.rows, before.events.items, before.events.times, before.events.kinds, strict=True),
        *((int(rng.integers(USERS)), int(rng.integers(ITEMS)), NOW + 1 + k, int(rng.integers(3))) for k in range(200)),
    ]
    rows = sorted(tuple(map(int, row)) for row in rows)
    rows.sort(key=lambda row: (row[0], row[2]))
    users, items, times, kinds = (np.array(part) for part in zip(*rows, strict=True))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(users, minlength=USERS))))
    planted = Events(log.events.users, offsets, items.astype(np.int32), times, kinds.astype(np.int8))
    clean = every_pair(before.counts())
    for events in (log.events, planted):
        assert len(events) > len(before.events)
        leaked = every_pair(Counts.at(events, NOW, log.things))
        assert all(np.array_equal(leaked[name], clean[name]) for name in clean)
    # The moment itself is counted.
    at_moment = Events(log.events.users, offsets, items.astype(np.int32), np.minimum(times, NOW), kinds.astype(np.int8))
    counted = every_pair(Counts.at(at_moment, NOW, log.things))
    assert not any(np.array_equal(counted[name], clean[name]) for name in clean)


@pytest.mark.parametrize("at_once", [1, 60, 10_000])
def test_all_that_is_read_of_the_log_is_counted_in_pieces_of_whole_buckets(at_once, monkeypatch):
    """Twice the same pieces, through `mapped`: nothing of a bucket is left to who adds up, and the sums are those."""
    monkeypatch.setattr(module, "EVENTS_AT_ONCE", at_once)
    log, given = random_log(0), []
    buckets = [log.events.of_bucket(bucket, 7) for bucket in range(7)]

    def mapped(work, shared, pieces, what, total):
        given.append((total, []))
        for piece in pieces:
            given[-1][1].append(list(map(id, piece)))
            yield work(shared, piece)

    counts, whole = Counts.over(buckets, NOW, log.things, mapped), log.counts()
    (unknown, pieces), (total, again) = given
    assert (unknown, total) == (None, len(pieces))
    assert pieces == again and list(chain(*pieces)) == list(map(id, buckets))
    assert (len(pieces) > 1) == (len(log.events) > at_once)
    assert_same_of_things(counts, whole)


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_dense_columns_pairs_and_keys_agree(block, monkeypatch):
    log = random_log(2)
    counts = log.counts()
    monkeypatch.setattr("conrec.blocklist.counts.SCORES_AT_ONCE", block * len(log.things))
    pairs = every_pair(counts)
    names = tuple(name for name in pairs if name != "expected")
    assert set(names) == {*counts.odds_names, *counts.exposure_names} - {"expected"}
    users = np.array([7, 2, 2, 20])
    for name, crossed in counts.crossed.items():
        assert np.array_equal(crossed.dense(users)[:, crossed.keys], pairs[name][users])
    assert np.array_equal(counts.expected(users), pairs["expected"][users])
    # Pairs in any order, and some twice.
    rng = np.random.default_rng(0)
    rows, things = rng.integers(0, USERS, 300), rng.integers(0, len(log.things), 300)
    columns = counts.columns(rows, things)
    assert all(np.array_equal(columns[name], pairs[name][rows, things]) for name in pairs)
    assert all(len(values) == 0 for values in counts.columns(rows[:0], things[:0]).values())


def test_users_who_said_nothing_lean_as_everybody_and_nowhere_in_particular():
    log = random_log(0)
    counts = log.counts()
    past = log.events.times <= NOW
    silent = sorted(set(range(USERS)) - set(log.events.rows[past & (log.events.kinds < 2)].tolist()))
    assert 5 in silent
    for crossed in counts.crossed.values():
        assert np.abs(crossed.dense(np.array(silent))).max() < 1e-6
    assert (counts.of_users["excess"][silent] == 0).all()
    rejections, likes = (np.count_nonzero(log.events.kinds[past] == kind) for kind in (REJECTED, LIKED))
    np.testing.assert_allclose(counts.of_users["leaning"][silent], math.log((rejections + 1) / (likes + 1)), rtol=1e-5)


def test_columns_are_finite_for_an_empty_log_and_a_moment_before_everything():
    log = random_log(0)
    for moment in (NOW, NOW - 1000 * DAY):
        nothing = Events(
            log.events.users, np.zeros(USERS + 1, np.int64), *(np.zeros(0, kind) for kind in ("i4", "i8", "i1"))
        )
        for events in (nothing, log.events.before(moment) if moment == NOW else log.events):
            columns = every_pair(Counts.at(events, moment, log.things))
            assert all(np.isfinite(values).all() for values in columns.values())


def test_things_are_items_then_ids_with_the_attributes_of_their_first_item():
    semantic_ids = np.array([[1, 0], [0, 2], [1, 0], [0, 1], [2, 2]])
    live = np.array([False, True, True, True, False])
    trie = Trie.of_live(semantic_ids, 3, live)
    things = Things.of(semantic_ids, trie, {"category": np.array([7, 1, 5, 0, 3])})
    assert (len(things), things.item_count) == (8, 5)
    # IDs 01, 02, 10; the item that is gone shares 10, the last one's ID has no live item.
    assert things.leaves.tolist() == [2, 1, 2, 0, -1, 0, 1, 2]
    assert things.attributes["category"].tolist() == [7, 1, 5, 0, 3, 0, 1, 5]
    codes = [*map(tuple, semantic_ids.tolist()), (0, 1), (0, 2), (1, 0)]
    for level, prefixes in enumerate(things.prefixes):
        for one in range(8):
            for other in range(8):
                assert (prefixes[one] == prefixes[other]) == (codes[one][: level + 1] == codes[other][: level + 1])
