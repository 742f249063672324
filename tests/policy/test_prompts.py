"""Prompts hold the history up to the anchor and nothing else, each kind within its budget."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from conrec.config import PromptSettings
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import LIKED, REJECTED, SHOWN, Events
from conrec.policy.prompts import CACHE_BLOCK, build_prompts
from conrec.policy.vocabulary import Vocabulary

VOCABULARY = Vocabulary(2, 8, 100, begin=0, rejected=1, liked=2, shown=3, item=4, text=5, choose=6, end=7)
SEMANTIC_IDS = np.array([[i // 8, i % 8] for i in range(64)])
DAY = 86_400_000_000


def world(kinds, days, items=None):
    """One user with these events; the anchor lies at the last one."""
    count = len(kinds)
    items = np.arange(count) if items is None else np.asarray(items)
    times = (np.asarray(days) * DAY).astype(np.int64)
    events = Events(pa.array(["u"]), np.array([0, count]), items.astype(np.int32), times, np.array(kinds, np.int8))
    last = np.array([times[-1]])
    end = np.array([count])
    return events, Anchors(np.zeros(1, np.int32), last, np.zeros(1, np.int64), end, end)


def typed(prompt):
    """(kind token, item) of each event of a prompt."""
    body = prompt[prompt != VOCABULARY.begin].reshape(-1, 3)
    assert (prompt[: len(prompt) - body.size] == VOCABULARY.begin).all()
    codes = body[:, :2] - 100 - np.array([0, 8])
    return list(zip(body[:, 2].tolist(), (codes[:, 0] * 8 + codes[:, 1]).tolist(), strict=True))


def test_events_come_in_order_each_kind_after_its_id_and_nothing_after_the_last():
    events, anchors = world([LIKED, SHOWN, REJECTED], [0, 1, 2], [5, 9, 33])
    (prompt,) = build_prompts(events, anchors, SEMANTIC_IDS, VOCABULARY, PromptSettings())
    assert typed(prompt) == [(2, 5), (3, 9), (1, 33)]
    assert prompt[-9:].tolist() == [100, 108 + 5, 2, 101, 108 + 1, 3, 104, 108 + 1, 1]


def test_a_prompt_has_a_begin_mark_whatever_fills_its_blocks():
    """Without events, one block of marks; where the events fill whole blocks, one more."""
    for count in (0, CACHE_BLOCK // 3, CACHE_BLOCK, 2 * CACHE_BLOCK):
        events, anchors = world([REJECTED] * max(count, 1), np.arange(max(count, 1)))
        if not count:
            anchors = Anchors(anchors.users, anchors.times, anchors.starts, anchors.starts, anchors.starts)
        settings = PromptSettings(max_negatives=99, max_events=99)
        (prompt,) = build_prompts(events, anchors, SEMANTIC_IDS, VOCABULARY, settings)
        assert len(prompt) == -(-(3 * count + 1) // CACHE_BLOCK) * CACHE_BLOCK
        assert len(typed(prompt)) == count and prompt[0] == VOCABULARY.begin


def test_blocks_choose_the_history():
    events, anchors = world([REJECTED, LIKED, REJECTED, SHOWN], [0, 1, 6, 7])
    settings = PromptSettings(recent_days=3)

    def block(*names):
        return typed(build_prompts(events, anchors, SEMANTIC_IDS, VOCABULARY, settings, names)[0])

    assert block("recent") == [(1, 2)]
    assert block("negatives") == [(1, 0), (1, 2)]
    assert block("negatives", "positives") == [(1, 0), (2, 1), (1, 2), (3, 3)]


def test_likes_cannot_crowd_out_rejections():
    events, anchors = world([REJECTED] * 3 + [LIKED] * 30 + [SHOWN] * 5, np.arange(38))
    settings = PromptSettings(max_negatives=2, max_events=6)
    kept = typed(build_prompts(events, anchors, SEMANTIC_IDS, VOCABULARY, settings)[0])
    assert kept == [(1, 1), (1, 2), (2, 29), (2, 30), (2, 31), (2, 32)]


def test_nothing_after_the_anchor_enters():
    events, anchors = world([REJECTED, REJECTED], [0, 1])
    early = Anchors(anchors.users, np.array([0]), anchors.starts, np.array([1]), np.array([2]))
    assert typed(build_prompts(events, early, SEMANTIC_IDS, VOCABULARY, PromptSettings())[0]) == [(1, 0)]


@given(
    st.lists(st.lists(st.sampled_from([REJECTED, LIKED, SHOWN]), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 10),
    st.integers(0, 10),
)
def test_budgets_and_cache_blocks(users, max_negatives, others):
    lengths = np.array([len(user) for user in users])
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    kinds = np.concatenate(users).astype(np.int8)
    times = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64) * DAY
    items = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    events = Events(pa.array([str(i) for i in range(len(users))]), offsets, items, times, kinds)
    anchors = Anchors(
        np.arange(len(users), dtype=np.int32), times[offsets[1:] - 1], offsets[:-1], offsets[1:], offsets[1:]
    )
    settings = PromptSettings(max_negatives=max_negatives, max_events=max_negatives + others)
    prompts = build_prompts(events, anchors, SEMANTIC_IDS, VOCABULARY, settings)
    for row, user in enumerate(users):
        kept = [(np.array(user) == kind).nonzero()[0].tolist() for kind in (REJECTED, LIKED, SHOWN)]
        rejected = kept[0][-max_negatives:]
        liked = kept[1][-(settings.max_events - len(rejected)) :] if settings.max_events > len(rejected) else []
        left = settings.max_events - len(rejected) - len(liked)
        shown = kept[2][-left:] if left else []
        expected = sorted([(i, 1) for i in rejected] + [(i, 2) for i in liked] + [(i, 3) for i in shown])
        assert typed(prompts[row]) == [(kind, item) for item, kind in expected]
        assert len(prompts[row]) % CACHE_BLOCK == 0
        assert prompts[row][0] == VOCABULARY.begin
