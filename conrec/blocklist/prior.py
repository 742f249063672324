"""What is counted of the log beside what the policy says: odds and freshness of a semantic ID, and what a user meets.

    score(ID) = log P(ID | rejected, history) - lambda log P(ID | liked, history) + prior(ID, history)
    prior = a log(odds / mean odds) + b log(recent exposure / exposure expected from all of the log)
            + c log(exposure that EASE expects of the history)

The policy ranks what a user will reject mostly by what the user will be shown, because only what is shown can be
rejected. The odds, rejections for every like, take from that what costs likes; the freshness what the feed has left
behind; EASE is a second opinion of what the user will be shown, which errs elsewhere. Odds and freshness are shared by
all users: they cost nothing at generation time. EASE costs one sparse product a batch.

Few users met one ID, so its shares of rejections and likes are drawn towards those of its prefix, level by level: what
shares a prefix is alike.

Invariant: only events until `now_us` are counted, each user once per semantic ID.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.feedback.anchors import LIKED, REJECTED, Events
from conrec.feedback.ease import Ease
from conrec.ragged import Ragged

ODDS_PRIOR = 20
"""Users with the shares of the prefix above, added to every prefix: what is shown to few says little."""
FRESHNESS_PRIOR = 5
"""Exposures added to recent and expected exposure."""
EASE_RIDGE = 200.0
EASE_LEAVES = 8192
"""Only so many IDs, the most met, take part in EASE (256 MiB)."""
EASE_LEAST = 1e-3
"""Added to what EASE expects, which is 0 or less for most IDs."""


@dataclass(frozen=True)
class Prior:
    """Shape: shared (M,) float32, the part of the score that is the same for every user."""

    shared: np.ndarray
    exposure: Ease | None = None
    weight: float = 0.0
    """c: of the log of expected exposure."""

    @classmethod
    def at(
        cls, events: Events, now_us: int, trie: Trie, settings: GenerateSettings, exposure: Ease | None = None
    ) -> Prior:
        """Counts what is known at a moment; `exposure` is what `fit_exposure` made of it, where that is at hand."""
        if settings.exposure and exposure is None:
            exposure = fit_exposure(events, now_us, trie)
        shared = leaf_prior(events, now_us, trie, settings)
        return cls(shared, exposure if settings.exposure else None, settings.exposure)

    def scores(self, histories: Ragged | None, leaves: np.ndarray) -> np.ndarray:
        """prior(ID, history). Without `exposure` no history is needed.

        Shape: histories B rows of leaves, leaves (B, W), -1 padding -> (B, W) float32.
        """
        asked = np.maximum(leaves, 0)
        found = self.shared[asked]
        if self.exposure is not None:
            assert histories is not None
            expected = self.exposure.scores_of(_matrix(histories, len(self.shared)), asked)
            found = found + self.weight * np.log(np.maximum(expected, 0) + np.float32(EASE_LEAST))
        return found.astype(np.float32)


def fit_exposure(events: Events, now_us: int, trie: Trie) -> Ease:
    """EASE on the leaves that users met until `now_us`, whatever their feedback."""
    known = (events.times <= now_us) & (trie.item_leaves[events.items] >= 0)
    met = Ragged.from_rows(events.rows[known], trie.item_leaves[events.items[known]], len(events.users))
    return Ease.fit(_matrix(met, len(trie)), EASE_RIDGE, EASE_LEAVES)


def leaf_prior(events: Events, now_us: int, trie: Trie, settings: GenerateSettings) -> np.ndarray:
    """The part of the score that is the same for every user. Shape: (M,) float32, 0 where both exponents are 0."""
    known = (events.times <= now_us) & (trie.item_leaves[events.items] >= 0)
    leaves = trie.item_leaves[events.items[known]].astype(np.int64)
    users, times = events.rows[known], events.times[known]
    prior = np.zeros(len(trie))
    if settings.rejection_odds:
        met = _users(leaves, users, len(trie))
        prefixes = _prefixes(trie)
        for kind, sign in ((REJECTED, 1), (LIKED, -1)):
            said = events.kinds[known] == kind
            share = _share(_users(leaves[said], users[said], len(trie)), met, prefixes)
            prior += sign * settings.rejection_odds * share
    if settings.freshness:
        shown = np.bincount(leaves, minlength=len(trie))
        recent_us = now_us - round(settings.freshness_days * 86_400e6)
        recent = np.bincount(leaves[times > recent_us], minlength=len(trie))
        expected = shown * recent.sum() / max(shown.sum(), 1)
        prior += settings.freshness * np.log((recent + FRESHNESS_PRIOR) / (expected + FRESHNESS_PRIOR))
    return prior.astype(np.float32)


def _prefixes(trie: Trie) -> list[np.ndarray]:
    """Which prefix of each length a leaf has, from short to whole. Shape: (M,) int64 each."""
    differs = np.logical_or.accumulate(trie.semantic_ids[1:] != trie.semantic_ids[:-1], axis=1)
    return [np.concatenate(([0], np.cumsum(column))) for column in differs.T]


def _share(said: np.ndarray, met: np.ndarray, prefixes: list[np.ndarray]) -> np.ndarray:
    """log of the share of users who say something of a leaf they met, less that of the mean share. Shape: (M,) each."""
    mean = said.sum() / max(met.sum(), 1)
    if mean == 0:  # nobody says it: then no ID differs
        return np.zeros(len(met))
    share = np.full(len(met), mean)
    for prefix in prefixes:
        share = (np.bincount(prefix, said)[prefix] + ODDS_PRIOR * share) / (
            np.bincount(prefix, met)[prefix] + ODDS_PRIOR
        )
    return np.log(share / mean)


def _users(leaves: np.ndarray, users: np.ndarray, leaf_count: int) -> np.ndarray:
    """How many users met each leaf. Shape: (N,) each -> (M,) int64."""
    pairs = np.unique(users.astype(np.int64) * leaf_count + leaves)
    return np.bincount(pairs % leaf_count, minlength=leaf_count)


def _matrix(rows: Ragged, leaf_count: int) -> sparse.csr_array:
    """Distinct leaves of each row as a 0/1 matrix of shape (B, M), float32."""
    pairs = np.unique(rows.rows * leaf_count + rows.values.astype(np.int64))
    ones = np.ones(len(pairs), np.float32)
    return sparse.csr_array((ones, (pairs // leaf_count, pairs % leaf_count)), shape=(len(rows), leaf_count))
