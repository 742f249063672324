"""What a policy is asked for anchors, and what it answers: the beams of a night, and what it says of given IDs.

    policy = Policy(engine, catalogue, events, settings)
    answers = policy.generate(anchors)
    columns = policy.says(anchors, rows, leaves)

Invariant: what a user has liked is never generated for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from conrec.blocklist.batches import judged_beams
from conrec.blocklist.engines import Engine
from conrec.blocklist.ranking import Answers
from conrec.blocklist.score import LOG_PROB, VERDICT
from conrec.catalogue.items import Catalogue
from conrec.config import Config
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, Events
from conrec.policy.prompts import build_prompts
from conrec.ragged import Ragged, ranges

_BLOCK = 512


@dataclass(frozen=True)
class Policy:
    """A policy that answers for anchors: what it generates, and what it says of given leaves."""

    engine: Engine
    catalogue: Catalogue
    events: Events
    config: Config

    def generate(self, anchors: Anchors, advance: Callable[[int], None] = lambda _: None) -> Answers:
        """What the night would generate for these anchors."""
        parts = []
        for rows in self._blocks(anchors):
            block = anchors.take(rows)
            liked = liked_leaves(self.catalogue.trie.item_leaves, self.events, block)
            found = judged_beams(self.engine, self._prompts(block), liked, self.config.generate.beam_width)
            parts.append(Answers.of_dense(*found))
            advance(len(rows))
        return Answers.joined(parts)

    def says(self, anchors: Anchors, rows: np.ndarray, leaves: np.ndarray) -> dict[str, np.ndarray]:
        """`log_prob` and `verdict` of pairs. Shape: rows (N,) positions of anchors, ascending; leaves (N,) -> (N,)."""
        answers = Ragged.from_rows(rows, leaves, len(anchors))
        found = {name: np.zeros(len(leaves), np.float32) for name in (LOG_PROB, VERDICT)}
        for block in self._blocks(anchors):
            dense = answers.take(block).padded(-1)
            prompts = self._prompts(anchors.take(block))
            place = slice(answers.offsets[block[0]], answers.offsets[block[-1] + 1])
            if dense.size:
                log_probs, verdicts = self.engine.score_and_judge(prompts, dense)
                found[LOG_PROB][place], found[VERDICT][place] = log_probs[dense >= 0], verdicts[dense >= 0]
        return found

    def _blocks(self, anchors: Anchors) -> Iterator[np.ndarray]:
        for start in range(0, len(anchors), _BLOCK):
            yield np.arange(start, min(start + _BLOCK, len(anchors)))

    def _prompts(self, anchors: Anchors) -> Ragged:
        semantic_ids, vocabulary = self.catalogue.semantic_ids, self.engine.vocabulary
        return build_prompts(self.events, anchors, semantic_ids, vocabulary, self.config.prompt)


def liked_ids(semantic_ids: np.ndarray, events: Events, anchors: Anchors) -> Ragged:
    """Codes of what each anchor's user has liked up to it, in the order of the log, live or not.

    Shape: semantic_ids (I, L), of all items; a row of K likes holds K x L codes.
    """
    lengths = anchors.ends - anchors.starts
    position = ranges(anchors.starts, lengths)
    liked = events.kinds[position] == LIKED
    codes = semantic_ids[events.items[position[liked]]]
    counts = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[liked], minlength=len(lengths))
    return Ragged.from_lengths(codes.ravel(), counts * codes.shape[1])


def liked_leaves(item_leaves: np.ndarray, events: Events, anchors: Anchors) -> Ragged:
    """Semantic IDs (leaves) of what each anchor's user has liked up to it: never generated.

    Shape: item_leaves (I,), the leaf of each item.
    """
    lengths = anchors.ends - anchors.starts
    position = ranges(anchors.starts, lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    leaves = item_leaves[events.items[position]]
    kept = (events.kinds[position] == LIKED) & (leaves >= 0)  # what disappeared cannot be generated anyway
    return Ragged.from_rows(row[kept], leaves[kept], len(lengths))
