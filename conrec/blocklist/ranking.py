"""One way from a history to a list: candidates -> score -> threshold -> guardrails, for the night and for all measures.

    ranking = Ranking(counts, score, trie, live, near)
    predicted, rules = ranking.predict(users, answers, thresholds)
    lists = published(ranking, events, users, answers, now_us, guardrails)

Every live item is a candidate and scored by its own semantic ID and itself. What the policy generated, and what lies
near it, is found by similarity; what was generated is scored by what the policy says of it too. Similarity is no score.

Invariant: a list at a larger threshold is the beginning of the list at a smaller one, unless an item is held back. So
the score of a row in the list at threshold 0 says at which thresholds the row is there: the night cuts it once, the
calibration and the measures everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pyarrow as pa

from conrec.blocklist.guardrails import Facts, Rows, admit, enough_history, facts, held_back, longest_list, select
from conrec.blocklist.resolve import Near, Predicted, Resolution, near
from conrec.blocklist.score import LOG_PROB, VERDICT, Estimate, sigmoid
from conrec.ragged import Ragged, pairs

if TYPE_CHECKING:
    from conrec.blocklist.counts import Counts
    from conrec.catalogue.trie import Trie
    from conrec.config import GuardrailSettings
    from conrec.feedback.events import Events


MOST_RULES = 1000
"""Semantic IDs whose unseen items are blocked for one user, the best by score; of equal ones the first leaves."""


@dataclass(frozen=True)
class Answers:
    """What the policy said for a block of users: B rows of generated leaves, the most probable first.

    Shape: leaves B rows; log_probs and verdicts (N,) float32 beside leaves.values: log P(ID | history), and
    log P(rejected | ID, history) - log P(liked | ID, history).
    """

    leaves: Ragged
    log_probs: np.ndarray
    verdicts: np.ndarray

    @classmethod
    def nothing(cls, users: int) -> Answers:
        """For users whom no policy was asked about."""
        none = np.zeros(0, np.float32)
        return cls(Ragged.from_lengths(np.zeros(0, np.int64), np.zeros(users, np.int64)), none, none)

    @classmethod
    def of_dense(cls, leaves: np.ndarray, log_probs: np.ndarray, verdicts: np.ndarray) -> Answers:
        """Of dense rows (B, W) each, whose leaves of -1 are padding."""
        real = leaves >= 0
        return cls(Ragged.from_lengths(leaves[real], real.sum(axis=1)), log_probs[real], verdicts[real])

    @classmethod
    def joined(cls, parts: list[Answers]) -> Answers:
        """Of blocks of users, one behind the other."""
        if not parts:
            return cls.nothing(0)
        leaves = Ragged.from_lengths(
            np.concatenate([part.leaves.values for part in parts]),
            np.concatenate([part.leaves.lengths for part in parts]),
        )
        numbers = (np.concatenate([getattr(part, name) for part in parts]) for name in ("log_probs", "verdicts"))
        return cls(leaves, *numbers)

    def to_arrow(self) -> pa.Table:
        """One row a user."""
        offsets = self.leaves.offsets
        return pa.table(
            {
                "leaves": self.leaves.to_arrow(),
                "log_probs": Ragged(self.log_probs, offsets).to_arrow(),
                "verdicts": Ragged(self.verdicts, offsets).to_arrow(),
            }
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Answers:
        """What `to_arrow` made."""
        leaves, *numbers = (Ragged.from_arrow(table[name]) for name in ("leaves", "log_probs", "verdicts"))
        return cls(leaves, *(part.values for part in numbers))

    def take(self, rows: np.ndarray) -> Answers:
        """The users at the given positions."""
        return Answers(
            self.leaves.take(rows),
            Ragged(self.log_probs, self.leaves.offsets).take(rows).values,
            Ragged(self.verdicts, self.leaves.offsets).take(rows).values,
        )


@dataclass(frozen=True)
class Ruled:
    """Semantic IDs whose unseen items are blocked, by user, then by leaf. Shape: (N,) each."""

    rows: np.ndarray
    leaves: np.ndarray
    scores: np.ndarray


class Scores(Protocol):
    """What orders things: the fitted score, or in the evaluation what it is compared with."""

    @property
    def judged(self) -> Estimate | None:
        """What there is beside it of the policy."""

    @property
    def reach(self) -> float:
        """How much exposure counts beside the odds."""

    def parts(self, counts: Counts, users: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log odds of a rejection and exposure of all things; `expected` is `counts.expected(users)`.

        A thing with odds of -inf is never predicted; exposure is finite.
        Shape: users (B,), expected (B, T) -> (B, T) float32 each.
        """

    def parts_of(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The same of pairs that the policy was asked about. Shape: (N,) a column -> (N,) each."""


@dataclass(frozen=True)
class Ranking:
    """A score at a moment over the live items. Shape: live (I,) bool; resolution: what lies near generated IDs."""

    counts: Counts
    score: Scores
    trie: Trie
    live: np.ndarray
    resolution: Resolution | None = None

    @property
    def block(self) -> int:
        """Users at a time."""
        return self.counts.block

    def parts(self, users: np.ndarray, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Log odds and exposure of all things, of those that the policy generated by what it says of them too.

        Shape: users (B,) rows of the events, answers B rows -> (B, T) float32 each.
        """
        expected = self.counts.expected(users)
        odds, exposure = self.score.parts(self.counts, users, expected)
        if len(answers.leaves.values) and self.score.judged is not None:
            items = self.trie.leaf_items.take(answers.leaves.values)
            each = np.arange(len(answers.leaves.values))
            place = np.concatenate([np.repeat(each, items.lengths), each])
            things = np.concatenate([items.values, len(self.live) + answers.leaves.values])
            rows = answers.leaves.rows[place]
            columns = self.counts.columns(users[rows], things, expected[rows, things])
            columns |= {LOG_PROB: answers.log_probs[place], VERDICT: answers.verdicts[place]}
            odds[rows, things], exposure[rows, things] = self.score.parts_of(columns)
        return odds, exposure

    def scores(self, users: np.ndarray, answers: Answers) -> np.ndarray:
        """Shape: users (B,) of the events, answers B rows -> (B, T) float32; 0, which no threshold admits, for an item
        that cannot be shown and for what has odds of -inf."""
        odds, exposure = self.parts(users, answers)
        values = sigmoid(odds + np.float32(self.score.reach) * exposure)
        values[odds == -np.inf] = 0
        values[:, : len(self.live)][:, ~self.live] = 0
        return values

    def predict(
        self, users: np.ndarray, answers: Answers, thresholds: np.ndarray, most: int | None = None
    ) -> tuple[Predicted, Ruled]:
        """What passes each user's threshold, and which IDs do for items that nobody met yet.

        Shape: users (B,) rows of the events; thresholds (B,), inf for a user who gets nothing predicted. `most`: only
        so many items of a user are needed, the best by score.
        """
        # Most users of a log have no threshold: too little history, or nothing was generated for them.
        asks = np.flatnonzero(thresholds < np.inf)
        values = np.zeros((0, len(self.counts.things)), np.float32)
        if len(asks):
            values = self.scores(users[asks], answers.take(asks))
        passing = (values >= thresholds[asks, None]) & (values > 0)
        items = len(self.live)
        for part, limit in ((slice(0, items), most), (slice(items, None), MOST_RULES)):
            width = values[:, part].shape[1]
            if limit is not None and limit < width:
                # A cap of less than one item leaves none, which is for the guardrails to say.
                place = width - max(limit, 1)
                last = np.partition(values[:, part], place, axis=1)[:, place]
                passing[:, part] &= values[:, part] >= last[:, None]
        # Of items the guardrails cut what ties for the last place; IDs that nobody met tie by the thousand.
        over = np.flatnonzero(np.count_nonzero(passing[:, items:], axis=1) > MOST_RULES)
        if len(over):
            rules, passed = values[over, items:], passing[over, items:]
            tie = passed & (rules == np.where(passed, rules, np.inf).min(axis=1, keepdims=True))
            room = MOST_RULES - np.count_nonzero(passed & ~tie, axis=1, keepdims=True)
            passing[over, items:] = passed & ~(tie & (np.cumsum(tie, axis=1) > room))
        rows, things = np.nonzero(passing)
        scores, unseen, rows = values[rows, things], things >= items, asks[rows]
        ruled = Ruled(rows[unseen], things[unseen] - items, scores[unseen])
        rows, seen, scores = rows[~unseen], things[~unseen].astype(np.int32), scores[~unseen]
        return Predicted(rows, seen, scores, *self._nearest(answers, rows, seen)), ruled

    def _nearest(self, answers: Answers, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Largest similarity of each pair to what was generated, and the ID that has it; else 0 and its own ID."""
        similarities = np.zeros(len(rows), np.float32)
        leaves = self.trie.item_leaves[items].astype(np.int64)
        if self.resolution is None or not len(answers.leaves.values):
            return similarities, leaves
        nearest: Near = near(answers.leaves, self.resolution)
        keys, predicted = pairs(nearest.rows, nearest.items, len(self.live)), pairs(rows, items, len(self.live))
        place = np.minimum(np.searchsorted(keys, predicted), len(keys) - 1)
        known = keys[place] == predicted if len(keys) else np.zeros(len(rows), bool)
        similarities[known], leaves[known] = nearest.similarities[place[known]], nearest.leaves[place[known]]
        return similarities, leaves


def candidates_needed(known: Facts, settings: GuardrailSettings) -> int | None:
    """How many of the best predictions of a user are enough for a list, whatever the rules on single users take away.

    None: all, since items may be held back.
    """
    if settings.max_user_share < 1:
        return None
    stated = np.bincount(np.concatenate([known.protected, known.explicit]) // known.item_count, minlength=1)
    return longest_list(known.live_count, settings) + int(stated.max())


@dataclass(frozen=True)
class Admitted:
    """A block of users after the rules on single users.

    Shape: places (B,) positions among the users that were asked for; thresholds (B,) that cut their predictions.
    """

    places: np.ndarray
    known: Facts
    thresholds: np.ndarray
    predicted: Predicted
    ruled: Ruled


def admitted(
    ranking: Ranking,
    events: Events,
    users: np.ndarray,
    answers: Answers,
    now_us: int,
    settings: GuardrailSettings,
    thresholds: Callable[[np.ndarray, Facts], np.ndarray],
) -> Iterator[Admitted]:
    """What a night predicts, block by block, before it counts for how many users it predicts an item.

    Shape: users (B,) rows of the events, answers B rows. `thresholds` gives those of a block by its places and facts,
    inf for no prediction; nobody with too little history has one.
    """
    live = ranking.live
    for start in range(0, len(users), ranking.block):
        places = np.arange(start, min(start + ranking.block, len(users)))
        known = facts(events, users[places], now_us, len(live), settings, live)
        limits = np.where(enough_history(known, settings), thresholds(places, known), np.inf)
        most = candidates_needed(known, settings)
        predicted, ruled = ranking.predict(users[places], answers.take(places), limits, most)
        yield Admitted(places, known, limits, admit(predicted, known, settings), ruled)


def published(
    ranking: Ranking,
    events: Events,
    users: np.ndarray,
    answers: Answers,
    now_us: int,
    settings: GuardrailSettings,
    held: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, Rows]]:
    """The longest lists that guardrails let a night publish for these users, block by block: at threshold 0.

    Shape: users (B,) of the events, answers B rows, held (I,) bool, items held back; yields positions in `users` and
    their rows, predicted ones with the score above which the row is published.
    """
    held = np.zeros(len(ranking.live), bool) if held is None else held
    everything = admitted(ranking, events, users, answers, now_us, settings, lambda places, _: np.zeros(len(places)))
    for block in everything:
        yield block.places, select(block.predicted, block.known, held, now_us, settings)


def held_at(
    ranking: Ranking,
    events: Events,
    users: np.ndarray,
    answers: Answers,
    now_us: int,
    settings: GuardrailSettings,
    thresholds: np.ndarray,
) -> np.ndarray:
    """Which items a night of these users would hold back at their thresholds.

    Shape: users (B,) of the events, answers B rows, thresholds (B,); returns (I,) bool, what `published` takes.
    """
    counts = np.zeros(len(ranking.live), np.int64)
    for block in admitted(ranking, events, users, answers, now_us, settings, lambda places, _: thresholds[places]):
        counts += np.bincount(block.predicted.items, minlength=len(counts))
    return held_back(counts, len(users), settings)


@dataclass(frozen=True)
class Listing:
    """What lists hold of some pairs, and how long they are.

    Shape: scores (N,) float32 of each pair: the list at threshold t holds it where t <= score; -inf: no list does;
    lengths: name -> (B,) predicted rows of each user at the thresholds of that name.
    """

    scores: np.ndarray
    lengths: Mapping[str, np.ndarray]


def listing(
    lists: Iterator[tuple[np.ndarray, Rows]],
    rows: np.ndarray,
    items: np.ndarray,
    item_count: int,
    thresholds: Mapping[str, np.ndarray],
) -> Listing:
    """Looks pairs up in what `published` yields.

    Shape: rows and items (N,) of the pairs, ascending by both; thresholds (B,) each.
    """
    scores = np.full(len(rows), -np.inf, np.float32)
    lengths = {name: np.zeros(len(values), np.int64) for name, values in thresholds.items()}
    for places, listed in lists:
        predicted = ~listed.explicit
        of, what, score = places[listed.rows[predicted]], listed.items[predicted], listed.scores[predicted]
        for name, values in thresholds.items():
            lengths[name] += np.bincount(of[score >= values[of]], minlength=len(values))
        keys = pairs(of, what, item_count)
        order = np.argsort(keys)
        keys = keys[order]
        first, last = np.searchsorted(rows, (places[0], places[-1] + 1))
        sought = pairs(rows[first:last], items[first:last], item_count)
        place = np.minimum(np.searchsorted(keys, sought), max(len(keys) - 1, 0))
        held = keys[place] == sought if len(keys) else np.zeros(len(sought), bool)
        scores[first:last][held] = score[order][place[held]]
    return Listing(scores, lengths)
