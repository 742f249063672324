"""What all systems of an evaluation are measured on: the anchors, what came before them, and what after.

    world = World.of(settings, items, events, end_us)
    world.histories, world.excluded, world.candidates       # what every system is asked, of the same anchors

Invariant: what a system may read of events lies at or before its anchor, and no target leaks into it. The items, and
so the semantic IDs of the trie, are those of the whole evaluation: one that is first met after the cut is there for
whatever chooses among IDs, where a night at the cut would not have had it, and nothing is counted of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from conrec.blocklist.asking import liked_leaves
from conrec.blocklist.counts import Counts, things_of
from conrec.catalogue.items import Catalogue, Items
from conrec.config import Config
from conrec.evaluation.baselines import Histories, Scores, best_items, item_scores
from conrec.evaluation.candidates import Candidates, candidate_sets
from conrec.evaluation.leaf_items import item_shares, leaf_items_by_rejections
from conrec.evaluation.leaks import check_no_leak
from conrec.evaluation.predictions import Task
from conrec.evaluation.published import shown_pairs
from conrec.evaluation.rows import LIST, Predictions, Row
from conrec.feedback.anchors import Anchors, evaluation_anchors, served_anchors
from conrec.feedback.enough import evaluation_warnings, require_evaluation, require_tuning
from conrec.feedback.events import REJECTED, SHOWN, Events
from conrec.feedback.histories import rejecting_users
from conrec.feedback.outcomes import first_meetings
from conrec.feedback.targets import Targets, targets
from conrec.hashing import mix, stable_hash
from conrec.progress import warn
from conrec.ragged import Ragged


@dataclass(frozen=True)
class World:
    """What all systems are measured on. Shape: A anchors; histories, targets, candidates have a row for each.

    The anchors are those of `evaluation_anchors`, which `measured` (A,) bool names, and beside them the others whom a
    night at the cut would serve and whose window judges a list: in `targets` they have none.
    """

    config: Config
    items: Items
    events: Events
    anchors: Anchors
    measured: np.ndarray
    targets: Targets
    histories: Histories
    excluded: Ragged

    @classmethod
    def of(cls, config: Config, items: Items, events: Events, end_us: int) -> World:
        """Of the events until `end_us`, the end of the last whole window.

        Raises `TooLittleDataError` without anchors, `DataError` where an anchor's targets leak into what is read.
        """
        measured = evaluation_anchors(events, config.timeline, end_us)
        require_evaluation(events, measured, config.timeline, end_us)
        if config.evaluation.systems == "all":
            require_tuning(events, config.timeline)
        for line in evaluation_warnings(events, measured):
            warn(line)
        anchors, is_measured = with_served(events, measured, config)
        limit = config.evaluation.max_anchors
        if limit is not None and len(anchors) > limit:
            chosen = np.sort(np.random.default_rng(config.seed).permutation(len(anchors))[:limit])
            anchors, is_measured = anchors.take(chosen), is_measured[chosen]
        ahead, histories = targets(events, anchors), Histories.at(events, anchors)
        training = events.before(config.timeline.cut_us)
        check_no_leak(events, anchors, ahead, histories, training, config.timeline.cut_us)
        return cls(
            config, items, events, anchors, is_measured, ahead.only(is_measured), histories, histories.distinct()
        )

    @property
    def catalogue(self) -> Catalogue:
        """The items, loaded with their semantic IDs."""
        assert isinstance(self.items, Catalogue)
        return self.items

    @cached_property
    def past(self) -> Events:
        """The events until the cut."""
        return self.events.before(self.config.timeline.cut_us)

    @cached_property
    def halves(self) -> np.ndarray:
        """Which half of the users each anchor's user is in, by a stable hash. Shape: (A,) bool.

        What has several settings is chosen on one half and read on the other.
        """
        users = stable_hash(self.events.users.take(pa.array(self.anchors.users)))
        # Mixed twice, so that it is another half than the one that calibrates thresholds (`conrec.blocklist.fitting`).
        return mix(mix(users)) % np.uint64(2) == 1

    @cached_property
    def served_rows(self) -> np.ndarray:
        """Which anchors are users that a night at the cut predicts for, and whose window says something: who rejected
        and liked nothing in it is a user of that night, and not among them. Shape: (S,) int64, ascending."""
        limits, cut_us = self.config.guardrails, self.config.timeline.cut_us
        served = served_anchors(self.events, cut_us, limits.min_negatives, limits.min_history)
        return np.flatnonzero((self.anchors.times == cut_us) & np.isin(self.anchors.users, served.users))

    @cached_property
    def served(self) -> Anchors:
        """Those anchors, with the windows that judge their lists."""
        return self.anchors.take(self.served_rows)

    def counts(self, time_us: int) -> Counts:
        """What is counted at a moment from the cut on: of users until then, of items until the cut."""
        if time_us == self.config.timeline.cut_us:
            return self._at_cut
        if time_us not in self._latest:
            self._latest.clear()  # each moment's holds what everybody did, and there may be hundreds
            self._latest[time_us] = self._at_cut.later(self.events, time_us)
        return self._latest[time_us]

    @cached_property
    def _at_cut(self) -> Counts:
        return Counts.at(self.events, self.config.timeline.cut_us, things_of(self.catalogue))

    @cached_property
    def _latest(self) -> dict[int, Counts]:
        return {}

    @cached_property
    def candidates(self) -> Candidates:
        """One future negative among items shown the same day, for each anchor."""
        return candidate_sets(self.events, self.anchors, targets(self.events, self.anchors), self.config.seed)

    @cached_property
    def candidate_leaves(self) -> np.ndarray:
        """Leaves of the candidates (A, C), -1 for padding."""
        items = self.candidates.items
        return np.where(items >= 0, self.catalogue.trie.item_leaves[items], -1).astype(np.int64)

    @cached_property
    def leaf_items(self) -> Ragged:
        """Items of each leaf, the most rejected first."""
        return leaf_items_by_rejections(self.catalogue.trie, self.past)

    @cached_property
    def shares(self) -> np.ndarray:
        """log of the share of each item in the rejections of its ID. Shape: (I,)."""
        return item_shares(self.catalogue.trie, self.past)

    @cached_property
    def liked_leaves(self) -> Ragged:
        """Leaves that each anchor's user has liked."""
        return liked_leaves(self.catalogue.trie.item_leaves, self.events, self.anchors)

    @cached_property
    def rejections(self) -> np.ndarray:
        """Distinct items that each anchor's user has rejected. Shape: (A,)."""
        return self.histories.distinct((REJECTED,)).lengths

    @cached_property
    def item_rejections(self) -> np.ndarray:
        """Users who rejected each item before the cut. Shape: (I,)."""
        return rejecting_users(self.past, len(self.items.items))

    @cached_property
    def task(self) -> Task:
        """What a system from outside is asked."""
        pairs = shown_pairs(self.events, self.served)
        rows = self.served_rows[pairs.users]
        asked, cut_us = self.candidates.items, self.config.timeline.cut_us
        return Task(self.events, self.items.items, self.anchors, self.measured, rows, pairs.items, asked, cut_us)

    def by_scores(self, scores: Scores) -> Row:
        """Lists and candidates of a system that scores all items, and its speed."""
        began = time.perf_counter()
        items, values = best_items(scores, self.histories, self.excluded, LIST)
        speed = len(items) / (time.perf_counter() - began)
        candidates = item_scores(scores, self.histories, self.candidates.items)
        return Row(Predictions(items, values, candidates), users_per_second=speed)


def with_served(events: Events, measured: Anchors, config: Config) -> tuple[Anchors, np.ndarray]:
    """The anchors, and those that a night at the cut would serve and that the window tells something of.

    Returns A anchors, those of `evaluation_anchors` first, and (A,) bool which these are.
    """
    timeline, limits = config.timeline, config.guardrails
    end_us = timeline.cut_us + timeline.horizon_us
    served = served_anchors(events, timeline.cut_us, limits.min_negatives, limits.min_history, end_us)
    outcomes = first_meetings(events, served)
    judged = np.unique(outcomes.anchors[outcomes.kinds != SHOWN])
    known = measured.users[measured.times == timeline.cut_us]
    others = served.take(judged[~np.isin(served.users[judged], known)])
    both = (np.concatenate(pair) for pair in zip(measured.columns, others.columns, strict=True))
    return Anchors(*both), np.repeat([True, False], [len(measured), len(others)])
