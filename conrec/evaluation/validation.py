"""What decides over a training: its measures on the validation anchors, and the pairs that judge its verdict."""

from __future__ import annotations

import numpy as np

from conrec.catalogue.items import Catalogue
from conrec.feedback.anchors import (
    Anchors,
    Events,
    targets,
)
from conrec.feedback.histories import history_items
from conrec.policy.samples import JudgedPairs
from conrec.ragged import Ragged


def judged_pairs(catalogue: Catalogue, events: Events, anchors: Anchors) -> JudgedPairs:
    """What each anchor rejects or likes in its window and has not met before, less what it does both to.

    Items without a semantic ID of the trie are left out. Shape: A anchors -> A rows of leaves.
    """
    item_count = len(catalogue.semantic_ids)
    wanted = targets(events, anchors)
    known, rejected, liked = (
        part.rows.astype(np.int64) * item_count + part.values
        for part in (history_items(events, anchors), wanted.future_negatives, wanted.future_positives)
    )
    told = np.setdiff1d(np.setxor1d(rejected, liked), known)
    anchor, item = np.divmod(told, item_count)
    leaves = catalogue.trie.item_leaves[item].astype(np.int64)
    live = leaves >= 0
    return JudgedPairs(
        Ragged.from_rows(anchor[live], leaves[live], len(anchors)), np.isin(told[live], rejected, assume_unique=True)
    )
