"""History -> prompt: a stream of typed events, each kind truncated separately, newest last.

    <begin> <a_1><b_7><c_3><liked> <a_2>...<shown> <a_4><b_2><c_9><rejected>

The ID of an event comes before its kind: a model of the stream so says which ID comes next, and after each ID what
the user thinks of it. With the kind first it would never be asked for that. Rejections get their budget first, likes
what is left, items merely shown the rest, so that the many positives cannot crowd out the few negatives (arXiv
2601.15721, progressive context). Each prompt is filled at the front with `<begin>`, at least one, up to a multiple of
`CACHE_BLOCK` tokens: an engine that caches prefixes in blocks then computes a prompt once for all its beams.

    prompts = build_prompts(events, anchors, semantic_ids, vocabulary, config.prompt, ("negatives", "positives"))
"""

from __future__ import annotations

import numpy as np

from conrec.config import DAY_US, PromptSettings
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged, ranges

CACHE_BLOCK = 32
"""Tokens in a block of vLLM's prefix cache: the smallest that its CPU attention takes (its default there is 128). What
a prompt had beyond its last full block would be computed again by every beam."""


def build_prompts(
    events: Events,
    anchors: Anchors,
    semantic_ids: np.ndarray,
    vocabulary: Vocabulary,
    settings: PromptSettings,
    blocks: tuple[str, ...] = ("negatives", "positives"),
) -> Ragged:
    """One prompt per anchor, from its history alone.

    Shape: semantic_ids (I, L) codes of each item row -> Ragged int32 token ids with A rows.
    """
    event, anchor = _in_prompt(events, anchors, settings, blocks)
    return event_stream(events, event, anchor, len(anchors), semantic_ids, vocabulary)


def select_events(
    kinds: np.ndarray,
    times: np.ndarray,
    anchor: np.ndarray,
    anchor_times: np.ndarray,
    settings: PromptSettings,
    blocks: tuple[str, ...],
) -> np.ndarray:
    """Which events enter the prompt. Shape: (N,) each, ordered by anchor then time -> bool (N,)."""
    count = len(anchor_times)
    negative = kinds == REJECTED
    if blocks == ("recent",):
        negative &= times > anchor_times[anchor] - round(settings.recent_days * DAY_US)
    kept = negative & (_newer_of_same(negative, anchor, count) < settings.max_negatives)
    for kind in (LIKED, SHOWN) if "positives" in blocks else ():
        budget = settings.max_events - np.bincount(anchor[kept], minlength=count)
        candidate = kinds == kind
        kept |= candidate & (_newer_of_same(candidate, anchor, count) < budget[anchor])
    return kept


def _newer_of_same(member: np.ndarray, anchor: np.ndarray, count: int) -> np.ndarray:
    """For each event, how many later members its anchor has (valid where `member`). Shape: (N,) -> (N,)."""
    upto = np.cumsum(member)
    per_anchor = np.bincount(anchor[member], minlength=count)
    return np.cumsum(per_anchor)[anchor] - upto


def event_stream(
    events: Events,
    event: np.ndarray,
    row: np.ndarray,
    row_count: int,
    semantic_ids: np.ndarray,
    vocabulary: Vocabulary,
) -> Ragged:
    """Begin marks, then semantic ID and kind token of each event.

    Shape: event (N,) positions in the log, row (N,) ascending -> Ragged int32 with row_count rows.
    """
    width = vocabulary.levels + 1
    counts = np.bincount(row, minlength=row_count)
    lengths = counts * width + 1
    lengths += -lengths % CACHE_BLOCK
    tokens = Ragged.from_lengths(np.full(int(lengths.sum()), vocabulary.begin, np.int32), lengths)
    typed = typed_events(events, event, semantic_ids, vocabulary)
    tokens.values[ranges(tokens.offsets[1:] - counts * width, counts * width)] = typed.ravel()
    return tokens


def typed_events(events: Events, event: np.ndarray, semantic_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """Semantic ID and kind token of each event. Shape: event (N,) positions in the log -> (N, L + 1) int32."""
    kinds = vocabulary.kinds[events.kinds[event]]
    return np.concatenate([vocabulary.code_tokens(semantic_ids[events.items[event]]), kinds[:, None]], axis=1)


def _in_prompt(
    events: Events, anchors: Anchors, settings: PromptSettings, blocks: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the log of the events that enter the prompts, and the anchor of each, ascending."""
    lengths = anchors.ends - anchors.starts
    event = ranges(anchors.starts, lengths)
    anchor = np.repeat(np.arange(len(lengths)), lengths)
    kept = select_events(events.kinds[event], events.times[event], anchor, anchors.times, settings, blocks)
    return event[kept], anchor[kept]
