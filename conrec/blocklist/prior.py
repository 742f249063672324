"""What is known of a semantic ID whoever asks: how readily everybody rejects it, and whether the feed still shows it.

    score(ID) = log P(ID | rejected, history) - lambda log P(ID | liked, history) + leaf_prior[ID]
    leaf_prior = a log(rate / mean rate) + b log(recent exposure / exposure expected from all of the log)

The policy ranks what a user will reject mostly by what the user will be shown, because only what is shown can be
rejected. The rate takes from that what nobody minds; the freshness what the feed has left behind. Both are counts of
the log until one moment, shared by all users: they cost nothing at generation time.

Invariant: only events until `now_us` are counted, each user once per semantic ID.
"""

from __future__ import annotations

import numpy as np

from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.feedback.anchors import REJECTED, Events

RATE_PRIOR = 20
"""Users with the mean rejection rate added to every ID: IDs shown to few say little."""
FRESHNESS_PRIOR = 5
"""Exposures added to recent and expected exposure."""


def leaf_prior(events: Events, now_us: int, trie: Trie, settings: GenerateSettings) -> np.ndarray:
    """The part of the score that is the same for every user. Shape: (M,) float32, 0 where both exponents are 0."""
    known = events.times <= now_us
    leaves = trie.item_leaves[events.items[known]].astype(np.int64)
    users, times = events.rows[known], events.times[known]
    prior = np.zeros(len(trie))
    if settings.rejection_rate:
        met = _users(leaves, users, len(trie))
        refused = events.kinds[known] == REJECTED
        rejected = _users(leaves[refused], users[refused], len(trie))
        mean = rejected.sum() / max(met.sum(), 1)
        # The mean rate itself may be 0: then no ID differs from it.
        rate = (rejected + RATE_PRIOR * mean) / (met + RATE_PRIOR)
        prior += settings.rejection_rate * np.log(rate / mean if mean else np.ones(len(trie)))
    if settings.freshness:
        shown = np.bincount(leaves, minlength=len(trie))
        recent_us = now_us - round(settings.freshness_days * 86_400e6)
        recent = np.bincount(leaves[times > recent_us], minlength=len(trie))
        expected = shown * recent.sum() / max(shown.sum(), 1)
        prior += settings.freshness * np.log((recent + FRESHNESS_PRIOR) / (expected + FRESHNESS_PRIOR))
    return prior.astype(np.float32)


def _users(leaves: np.ndarray, users: np.ndarray, leaf_count: int) -> np.ndarray:
    """How many users met each leaf. Shape: (N,) each -> (M,) int64."""
    pairs = np.unique(users.astype(np.int64) * leaf_count + leaves)
    return np.bincount(pairs % leaf_count, minlength=leaf_count)
