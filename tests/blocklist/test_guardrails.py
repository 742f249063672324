"""What no blocklist may do, against a plain reference in loops."""

from __future__ import annotations

import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.blocklist.guardrails import admit, facts, held_back, longest_list, require_room, select
from conrec.blocklist.resolve import Predicted
from conrec.config import GuardrailSettings
from conrec.errors import ConfigError
from conrec.feedback.events import Events

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000
ITEMS = 20
LIMITS = GuardrailSettings(max_items_per_user=100, max_catalogue_share=1.0, max_user_share=1.0, min_history=1)


def predicted_of(rows):
    """From (user, item, score), any order; the leaf is the item's number, the similarity one minus the score."""
    rows = sorted(rows)
    columns = list(zip(*rows, strict=True)) if rows else [(), (), ()]
    return Predicted(
        rows=np.array(columns[0], np.int64),
        items=np.array(columns[1], np.int32),
        scores=np.array(columns[2], np.float32),
        similarities=1 - np.array(columns[2], np.float32),
        leaves=np.array(columns[1], np.int64),
    )


def publish_rows(events, predicted, limits, users=None):
    """Both passes over one block, as {(user, item): explicit}, and the rows."""
    users = np.arange(len(events.users)) if users is None else users
    known = facts(events, users, NOW, ITEMS, limits)
    admitted = admit(predicted, known, limits)
    held = held_back(np.bincount(admitted.items, minlength=ITEMS), len(users), limits)
    rows = select(admitted, known, held, NOW, limits)
    found = dict(zip(zip(rows.rows.tolist(), rows.items.tolist(), strict=True), rows.explicit.tolist(), strict=True))
    assert len(found) == len(rows.rows)
    return found, rows


def test_a_liked_item_is_never_predicted_while_it_is_protected(make_events):
    events = make_events({"a": [(1, "rejected", 5), (7, "liked", 89), (8, "liked", 91), (9, "liked", 90)]})
    predicted = predicted_of([(0, 7, 0.9), (0, 8, 0.9), (0, 9, 0.9), (0, 10, 0.9)])
    found, _ = publish_rows(events, predicted, LIMITS)
    assert found == {(0, 1): True, (0, 8): False, (0, 10): False}


@pytest.mark.parametrize(("liked", "rejected"), [(10, 5), (5, 10), (5, 5)])
def test_the_allow_list_wins_over_rejections_too_whichever_came_first(make_events, liked, rejected):
    events = make_events({"a": [(7, "liked", liked), (7, "rejected", rejected)]})
    found, _ = publish_rows(events, predicted_of([(0, 7, 0.9)]), LIMITS)
    assert found == {}
    known = facts(events, np.array([0]), NOW, ITEMS, LIMITS)
    assert known.allowed == 1


def test_explicit_rejections_block_until_they_expire(make_events):
    limits = LIMITS.model_copy(update={"explicit_days": 30.0})
    events = make_events({"a": [(1, "rejected", 29), (2, "rejected", 30), (3, "rejected", 40), (3, "rejected", 10)]})
    found, rows = publish_rows(events, predicted_of([]), limits)
    assert found == {(0, 3): True, (0, 1): True}  # the newest first
    assert rows.expires_us.tolist() == [NOW + 20 * DAY, NOW + 1 * DAY]
    assert rows.leaves.tolist() == [-1, -1]


def test_predictions_block_then_demote_from_the_watermark(make_events):
    events = make_events({"a": [(1, "rejected", 100)]})
    limits = LIMITS.model_copy(update={"predicted_days": 2.5, "predicted_demote_days": 4})
    _, rows = publish_rows(events, predicted_of([(0, 5, 0.4)]), limits)
    assert rows.demotes_us.tolist() == [NOW + round(2.5 * DAY)]
    assert rows.expires_us.tolist() == [NOW + round(6.5 * DAY)]
    assert rows.scores.tolist() == [np.float32(0.4)]
    assert rows.similarities.tolist() == [np.float32(0.6)]
    assert rows.leaves.tolist() == [5]


def test_a_rejection_demotes_after_its_days_where_the_settings_say_so(make_events):
    events = make_events({"a": [(1, "rejected", 29), (2, "rejected", 33), (3, "rejected", 36)]})
    limits = LIMITS.model_copy(update={"explicit_days": 30, "explicit_demote_days": 5})
    _, rows = publish_rows(events, predicted_of([]), limits)
    assert rows.items.tolist() == [1, 2]
    assert rows.demotes_us.tolist() == [NOW + DAY, NOW - 3 * DAY]
    assert rows.expires_us.tolist() == [NOW + 6 * DAY, NOW + 2 * DAY]


def test_what_happens_after_the_watermark_is_not_known(make_events):
    events = make_events({"a": [(1, "rejected", 1), (5, "liked", -1), (6, "rejected", -1)]})
    found, _ = publish_rows(events, predicted_of([(0, 5, 0.8)]), LIMITS)
    assert found == {(0, 1): True, (0, 5): False}


def test_users_with_few_rejections_get_only_their_own(make_events):
    limits = LIMITS.model_copy(update={"min_negatives": 2})
    events = make_events({"a": [(1, "rejected", 1)], "b": [(1, "rejected", 1), (2, "rejected", 100)]})
    found, _ = publish_rows(events, predicted_of([(0, 5, 0.8), (1, 5, 0.8)]), limits)
    assert found == {(0, 1): True, (1, 1): True, (1, 5): False}


def test_users_with_few_distinct_items_get_only_their_own_rejections(make_events):
    """What is shown counts, twice the same does not, nor what happens later."""
    limits = LIMITS.model_copy(update={"min_history": 3})
    events = make_events(
        {
            "a": [(1, "rejected", 1), (2, "shown", 1), (2, "liked", 0.5), (3, "shown", -1)],
            "b": [(1, "rejected", 1), (2, "shown", 1), (3, "shown", 400)],
        }
    )
    known = facts(events, np.arange(2), NOW, ITEMS, limits)
    assert known.met.tolist() == [2, 3]
    found, _ = publish_rows(events, predicted_of([(0, 5, 0.8), (1, 5, 0.8)]), limits)
    assert found == {(0, 1): True, (1, 1): True, (1, 5): False}


def test_an_item_both_rejected_and_predicted_appears_once_as_explicit(make_events):
    events = make_events({"a": [(1, "rejected", 1)]})
    found, _ = publish_rows(events, predicted_of([(0, 1, 0.99)]), LIMITS)
    assert found == {(0, 1): True}


def test_an_expired_rejection_may_be_predicted(make_events):
    events = make_events({"a": [(1, "rejected", 100)]})
    found, _ = publish_rows(events, predicted_of([(0, 1, 0.99)]), LIMITS)
    assert found == {(0, 1): False}


def test_an_item_predicted_for_too_many_users_is_held_back_but_not_its_rejections(make_events):
    limits = LIMITS.model_copy(update={"max_user_share": 0.5})
    events = make_events({user: [(0, "rejected", 1)] for user in "abc"} | {"d": [(5, "rejected", 1)]})
    everywhere = [(user, 5, 0.9) for user in range(4)] + [(user, 6, 0.9) for user in range(2)]
    found, _ = publish_rows(events, predicted_of(everywhere), limits)
    assert {pair for pair, explicit in found.items() if not explicit} == {(0, 6), (1, 6)}
    assert found[3, 5] is True


def test_longest_lists_keep_explicit_rows_then_the_best_scores(make_events):
    limits = LIMITS.model_copy(update={"max_items_per_user": 3})
    events = make_events({"a": [(1, "rejected", 9), (2, "rejected", 3)]})
    predicted = predicted_of([(0, 5, 0.1), (0, 6, 0.5), (0, 7, 0.2)])
    _, rows = publish_rows(events, predicted, limits)
    assert rows.items.tolist() == [2, 1, 6]


def test_the_share_of_the_catalogue_is_a_cap_too():
    share = LIMITS.model_copy(update={"max_catalogue_share": 0.29})
    assert longest_list(100, share) == 29  # .29 * 100 is 28.999... in binary
    assert longest_list(99, share) == 28
    assert longest_list(3, share) == 0


def test_a_block_of_some_users_keeps_to_them(make_events):
    events = make_events({"a": [(1, "rejected", 1)], "b": [(2, "rejected", 1)], "c": [(3, "rejected", 1)]})
    found, _ = publish_rows(events, predicted_of([(1, 9, 0.5)]), LIMITS, np.array([0, 2]))
    assert found == {(0, 1): True, (1, 3): True, (1, 9): False}


def reference(events, predicted, limits):
    """The rules in loops: a list of (item, explicit) for each user, in order."""
    catalogue_cap = math.floor(limits.max_catalogue_share * ITEMS + 1e-9)
    cap = min(limits.max_items_per_user, catalogue_cap)
    lists, candidates = [], []
    for user in range(len(events.users)):
        mine = [
            (int(events.items[place]), int(events.times[place]), int(events.kinds[place]))
            for place in range(events.offsets[user], events.offsets[user + 1])
            if events.times[place] <= NOW
        ]
        liked = {item for item, time, kind in mine if kind == 1 and time >= NOW - limits.protect_days * DAY}
        latest = {}
        for item, time, kind in mine:
            if kind == 0:
                latest[item] = max(time, latest.get(item, 0))
        explicit = {
            item: time for item, time in latest.items() if item not in liked and time + limits.explicit_days * DAY > NOW
        }
        lists.append([item for item, _ in sorted(explicit.items(), key=lambda pair: (-pair[1], pair[0]))])
        enough = sum(kind == 0 for _, _, kind in mine) >= limits.min_negatives
        enough &= len({item for item, _, _ in mine}) >= limits.min_history
        candidates.append(
            {
                item: score
                for row, item, score in predicted
                if row == user and enough and item not in liked and item not in explicit
            }
        )
    result = []
    for user, explicit in enumerate(lists):
        scores = {
            item: score
            for item, score in candidates[user].items()
            if sum(item in other for other in candidates) <= limits.max_user_share * len(lists) + 1e-9
        }
        ordered = [(item, True) for item in explicit]
        ordered += [(item, False) for item in sorted(scores, key=lambda item: (-scores[item], item))]
        result.append(ordered[:cap])
    return result


EVENT = st.tuples(
    st.integers(0, ITEMS - 1),
    st.sampled_from(["rejected", "liked", "shown"]),
    st.sampled_from([-2, 0, 1, 5, 10, 20, 30, 40]),
)
PREDICTION = st.tuples(
    st.integers(0, 3),
    st.integers(0, ITEMS - 1),
    st.sampled_from([0.125, 0.25, 0.5, 0.75]),
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(EVENT, max_size=12), min_size=4, max_size=4),
    st.lists(PREDICTION, max_size=40, unique_by=lambda row: row[:2]),
    st.integers(1, 6),
    st.sampled_from([0.1, 0.25, 1.0]),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_guardrails_equal_the_loops(
    histories, predictions, longest, catalogue_share, user_share, min_negatives, min_history
):
    limits = GuardrailSettings(
        protect_days=10,
        explicit_days=20,
        max_items_per_user=longest,
        max_catalogue_share=catalogue_share,
        max_user_share=user_share,
        min_negatives=min_negatives,
        min_history=min_history,
    )
    events = events_of(histories)
    found, _ = publish_rows(events, predicted_of(predictions), limits)
    expected = reference(events, predictions, limits)
    flat = [((user, item), explicit) for user, rows in enumerate(expected) for item, explicit in rows]
    assert list(found.items()) == flat

    # The promises themselves, apart from the reference.
    for user in range(4):
        own = [item for row, item in found if row == user]
        assert len(own) <= min(longest, catalogue_share * ITEMS)
        liked = {item for item, kind, days in histories[user] if kind == "liked" and 0 <= days <= 10}
        assert not liked & set(own)
    for item in range(ITEMS):
        assert sum(not explicit for (_, other), explicit in found.items() if other == item) <= user_share * 4


def events_of(histories):
    ordered = [sorted(rows, key=lambda event: -event[2]) for rows in histories]
    flat = [event for rows in ordered for event in rows]
    return Events(
        users=pa.array([f"user{number}" for number in range(len(histories))]),
        offsets=np.concatenate(([0], np.cumsum([len(rows) for rows in ordered]))).astype(np.int64),
        items=np.array([item for item, _, _ in flat], np.int32),
        times=np.array([NOW - days * DAY for _, _, days in flat], np.int64),
        kinds=np.array([("rejected", "liked", "shown").index(kind) for _, kind, _ in flat], np.int8),
    )


@pytest.mark.parametrize("items", [1, 3, 7, 19, 33, 150])
def test_a_share_of_less_than_one_item_is_refused_with_one_that_is_enough(items):
    too_small = GuardrailSettings(max_catalogue_share=0.9 / items)
    with pytest.raises(ConfigError, match=rf"max_catalogue_share = \S+ of {items} items") as error:
        require_room(items, too_small)
    enough = float(re.search(r"write (\S+) or more", str(error.value)).group(1))
    require_room(items, GuardrailSettings(max_catalogue_share=enough))
    assert longest_list(items, GuardrailSettings(max_catalogue_share=enough)) >= 1
