"""The three supervised tasks as token sequences with a mask of targets.

1. Translation: semantic ID -> item text, item text -> semantic ID.
2. Item-level alignment: which of four items was rejected by a user who liked the other three? No history is shown
   (arXiv 2601.15721, item-level alignment).
3. Warm-up: the history as a stream of typed events, every position after the begin marks a target: which ID comes
   next, and what the user thinks of it.

    examples = warm_up(events, semantic_ids, vocabulary, max_events=48, seed=0)    # tokens and which are targets
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from conrec.config import SupervisedSettings
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.policy.prompts import CACHE_BLOCK, typed_events
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged, pairs, places, ranges

OPTIONS = 4
"""Options of an alignment question."""
DISTRACTORS = ("positive", "popularity", "shown")
"""Kinds of the options that were not rejected."""


@dataclass(frozen=True)
class Examples:
    """Token sequences; the loss is taken where `is_target` (same layout) holds.

    Shape: tokens Ragged int32 with R rows, is_target (N,) bool.
    """

    tokens: Ragged
    is_target: np.ndarray

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at the given positions."""
        return Examples(self.tokens.take(rows), Ragged(self.is_target, self.tokens.offsets).take(rows).values)


def translation(texts: list[str], semantic_ids: np.ndarray, tokenizer: Any, vocabulary: Vocabulary) -> Examples:
    """`<item> ID <text> words <end>` and `<text> words <item> ID`, two examples an item.

    Shape: I texts, semantic_ids (I, L) -> 2 I examples. Texts are cut after 64 tokens.
    """
    # A text that holds `<rejected>` or `<a_12>` has written it; it is not the mark.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, truncation=True, max_length=64)[
        "input_ids"
    ]
    words = Ragged.from_lengths(
        np.fromiter((token for row in encoded for token in row), np.int32), np.array([len(row) for row in encoded])
    )
    codes = vocabulary.code_tokens(semantic_ids)
    count, levels = codes.shape
    item, text, end = (
        Ragged.from_lengths(np.full(count, token, np.int32), np.ones(count, np.int64))
        for token in (vocabulary.item, vocabulary.text, vocabulary.end)
    )
    identifiers = Ragged.from_lengths(codes.ravel(), np.full(count, levels))
    to_text, to_text_target = _join([(item, False), (identifiers, False), (text, False), (words, True), (end, True)])
    to_id, to_id_target = _join([(text, False), (words, False), (item, False), (identifiers, True)])
    tokens = Ragged(
        np.concatenate([to_text.values, to_id.values]),
        np.concatenate([to_text.offsets, to_id.offsets[1:] + to_text.offsets[-1]]),
    )
    return Examples(tokens, np.concatenate([to_text_target, to_id_target]))


def _join(parts: list[tuple[Ragged, bool]]) -> tuple[Ragged, np.ndarray]:
    """Concatenates ragged arrays row by row; returns the mask of the values that came from target parts."""
    lengths = np.stack([part.lengths for part, _ in parts], axis=1)
    starts = np.cumsum(lengths.ravel()).reshape(lengths.shape) - lengths
    values = np.empty(int(lengths.sum()), np.int32)
    target = np.zeros(len(values), bool)
    for column, (part, is_target) in enumerate(parts):
        place = ranges(starts[:, column], lengths[:, column])
        values[place] = part.values
        target[place] = is_target
    return Ragged.from_lengths(values, lengths.sum(axis=1)), target


def warm_up(events: Events, semantic_ids: np.ndarray, vocabulary: Vocabulary, max_events: int, seed: int) -> Examples:
    """Every user's events in pieces of at most `max_events`, after 1 to `CACHE_BLOCK` begin marks.

    The number of marks is random because a prompt is filled up to a multiple of `CACHE_BLOCK` with them.
    """
    lengths = np.diff(events.offsets)
    pieces = -(-lengths // max_events)
    user = np.repeat(np.arange(len(lengths)), pieces)
    starts = events.offsets[user] + places(pieces) * max_events
    counts = np.minimum(max_events, events.offsets[user + 1] - starts)
    width = vocabulary.levels + 1
    # Few marks more often than many: they cost computation and teach little.
    marks = 1 + (CACHE_BLOCK * np.random.default_rng(seed).random(len(user)) ** 3).astype(np.int64)
    tokens = Ragged.from_lengths(
        np.full(int((marks + counts * width).sum()), vocabulary.begin, np.int32), marks + counts * width
    )
    typed = typed_events(events, ranges(starts, counts), semantic_ids, vocabulary)
    place = ranges(tokens.offsets[:-1] + marks, counts * width)
    tokens.values[place] = typed.ravel()
    is_target = np.zeros(len(tokens.values), bool)
    is_target[place] = True
    return Examples(tokens, is_target)


def drop_events(examples: Examples, width: int, share: float, random: np.random.Generator) -> Examples:
    """Warm-up sequences without a random share of their events; `width` tokens an event, all of them targets.

    What is shown to a user next depends little on any one event before it: a history with gaps is another history.
    """
    targets = np.flatnonzero(examples.is_target)
    kept = np.ones(len(examples.is_target), bool)
    kept[targets] = np.repeat(random.random(len(targets) // width) >= share, width)
    lengths = np.bincount(examples.tokens.rows, kept, len(examples.tokens)).astype(np.int64)
    return Examples(Ragged.from_lengths(examples.tokens.values[kept], lengths), examples.is_target[kept])


def next_negative(prompts: Ragged, semantic_ids: np.ndarray, vocabulary: Vocabulary) -> Examples:
    """Prompts, then the semantic ID of the next rejection, the only target.

    Shape: prompts R rows, semantic_ids (R, L) -> R examples.
    """
    codes = vocabulary.code_tokens(semantic_ids)
    answers = Ragged.from_lengths(codes.ravel(), np.full(len(codes), codes.shape[1]))
    tokens, is_target = _join([(prompts, False), (answers, True)])
    return Examples(tokens, is_target)


@dataclass(frozen=True)
class Questions:
    """Alignment questions. Shape: options (Q, 4) item rows, answer (Q,) column of the rejected one, users (Q,)."""

    options: np.ndarray
    answer: np.ndarray
    users: np.ndarray

    def take(self, rows: np.ndarray) -> Questions:
        """The questions at the given positions."""
        return Questions(self.options[rows], self.answer[rows], self.users[rows])


def alignment_questions(
    events: Events, semantic_ids: np.ndarray, categories: np.ndarray, settings: SupervisedSettings, seed: int
) -> Questions:
    """One question per rejection whose unit the user rejected at least `alignment_min_rejections` times.

    The distractors are, in equal shares, of the `DISTRACTORS`: the user's own likes; any likes of other users, drawn in
    proportion to how often the item is liked; items shown to the user without feedback. Where a user has none of a
    kind, likes of others stand in. A question with an option beside the answer that this user rejected, too, is left
    out, and one for which nothing was liked or shown. Shape: semantic_ids (I, L), categories (I,) int.
    """
    random = np.random.default_rng(seed)
    user = events.rows
    unit = _units(semantic_ids, categories, settings.alignment_unit)
    rejected = np.flatnonzero(events.kinds == REJECTED)
    pair = pairs(user[rejected], unit[events.items[rejected]], int(unit.max(initial=0)) + 1)
    _, inverse, counts = np.unique(pair, return_inverse=True, return_counts=True)
    questioned = rejected[counts[inverse] >= settings.alignment_min_rejections]
    kind = random.integers(len(DISTRACTORS), size=len(questioned))
    distractors = np.empty((len(questioned), OPTIONS - 1), np.int64)
    liked_items = events.items[events.kinds == LIKED]
    for index, name in enumerate(DISTRACTORS):
        rows = np.flatnonzero(kind == index)
        drawn = _draw(liked_items, len(rows), random)
        if name != "popularity":
            own = np.flatnonzero(events.kinds == (LIKED if name == "positive" else SHOWN))
            drawn = _draw_own(events.items[own], user[own], user[questioned[rows]], drawn, random)
        distractors[rows] = drawn
    options = np.concatenate([events.items[questioned][:, None], distractors], axis=1)
    order = random.permuted(np.tile(np.arange(OPTIONS), (len(questioned), 1)), axis=1)
    options = np.take_along_axis(options, order, axis=1)
    # A distractor with the answer's semantic ID, or one that was rejected as well, would be another right answer.
    answerable = (semantic_ids[options] == semantic_ids[events.items[questioned]][:, None]).all(-1).sum(1) == 1
    known = pairs(user[rejected], events.items[rejected], len(semantic_ids))
    answerable &= ~np.isin(pairs(user[questioned][:, None], distractors, len(semantic_ids)), known).any(1)
    answerable &= (distractors >= 0).all(1)
    return Questions(options[answerable], np.argmin(order, axis=1)[answerable], user[questioned][answerable])


def _units(semantic_ids: np.ndarray, categories: np.ndarray, unit: str) -> np.ndarray:
    if unit == "item":
        return np.arange(len(semantic_ids))
    if unit == "category":
        return categories
    if unit == "prefix":
        return semantic_ids[:, 0]
    return np.unique(semantic_ids, axis=0, return_inverse=True)[1].reshape(-1)


def _draw(pool: np.ndarray, rows: int, random: np.random.Generator) -> np.ndarray:
    """Draws from a pool, -1 from an empty one."""
    if not len(pool):
        return np.full((rows, OPTIONS - 1), -1)
    return pool[random.integers(len(pool), size=(rows, OPTIONS - 1))]


def _draw_own(
    items: np.ndarray, owners: np.ndarray, users: np.ndarray, fallback: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Draws from each user's own items, given sorted by owner; `fallback` where there are none."""
    low, high = np.searchsorted(owners, users), np.searchsorted(owners, users, side="right")
    place = low[:, None] + (random.random(fallback.shape) * (high - low)[:, None]).astype(np.int64)
    if not len(items):
        return fallback
    return np.where((high > low)[:, None], items[np.minimum(place, len(items) - 1)], fallback)


def choices(options: np.ndarray, semantic_ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`<choose> ID ID ... <rejected>`: which of these? Shape: options (Q, C) item rows -> (Q, C L + 2) tokens."""
    count = len(options)
    # Not -1: it is unknown of no questions.
    listed = vocabulary.code_tokens(semantic_ids[options]).reshape(count, options.shape[1] * semantic_ids.shape[1])
    mark = np.full((count, 1), vocabulary.choose, np.int32)
    return np.concatenate([mark, listed, np.full((count, 1), vocabulary.rejected, np.int32)], axis=1)


def alignment(questions: Questions, semantic_ids: np.ndarray, vocabulary: Vocabulary) -> Examples:
    """`<choose> ID ID ID ID <rejected> ID`, the last ID the target."""
    count = len(questions.answer)
    answers = vocabulary.code_tokens(semantic_ids[questions.options[np.arange(count), questions.answer]])
    tokens = np.concatenate([choices(questions.options, semantic_ids, vocabulary), answers], axis=1)
    is_target = np.zeros(tokens.shape, bool)
    is_target[:, -vocabulary.levels :] = True
    return Examples(Ragged.from_lengths(tokens.ravel(), np.full(count, tokens.shape[1])), is_target.ravel())
