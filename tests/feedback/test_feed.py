"""A night's log in figures: what loops count, and what lies too far from the night before, no more and no less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conrec.config import DAY_US, NightlySettings
from conrec.feedback import feed as module
from conrec.feedback.events import CODED, Events, arranged
from conrec.feedback.feed import Feed, findings
from conrec.tables import KINDS

HOUR = DAY_US // 24
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 5), st.integers(0, 3), st.integers(0, 50).map(lambda hours: hours * HOUR), st.integers(0, 2)
    )
)


def log_of(rows) -> Events:
    users, items, times, kinds = np.array(rows, np.int64).reshape(-1, 4).T
    names = pa.array([f"user{number}" for number in users], pa.string()).dictionary_encode()
    columns = [names, pa.array(items.astype(np.int32)), pa.array(times), pa.array(kinds.astype(np.int8))]
    return arranged([pa.table(columns, schema=CODED)])


@given(EVENTS, st.integers(20, 50), st.none() | st.integers(0, 60), st.integers(1, 4))
def test_what_is_counted_of_buckets_is_what_a_loop_counts(rows, until, earlier, buckets):
    until, earlier = until * HOUR, None if earlier is None else earlier * HOUR
    events = log_of(rows)
    feed = Feed.of([events.of_bucket(bucket, buckets) for bucket in range(buckets)], 4, until, earlier)
    known = [row for row in rows if row[2] <= until]
    today = [row for row in known if row[2] > until - DAY_US]
    past = [row for row in known if row[2] <= until - DAY_US]
    assert feed.events == len(known)
    assert feed.until_earlier == len([row for row in known if earlier is None or row[2] <= earlier])
    assert feed.day == {
        "events": len(today),
        **{kind: sum(row[3] == code for row in today) for code, kind in enumerate(KINDS)},
        "repeated": len(today) - len(set(today)),
        "users": len({row[0] for row in today}),
        "new_users": len({row[0] for row in today} - {row[0] for row in past}),
        "items": len({row[1] for row in today}),
        "new_items": len({row[1] for row in today} - {row[1] for row in past}),
    }
    assert Feed.read(feed.to_json()) == feed


USUAL = Feed(
    100 * DAY_US,
    100_000,
    100_000,
    {
        "events": 10_000,
        **dict(zip(KINDS, (3_000, 3_000, 4_000), strict=True)),
        "repeated": 10,
        "users": 5_000,
        "new_users": 250,
        "items": 2_000,
        "new_items": 50,
    },
)
LIMITS = NightlySettings()


def tomorrow(**day) -> Feed:
    return Feed(101 * DAY_US, 110_000, day.pop("until_earlier", 100_000), {**USUAL.day, **day})


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (tomorrow(), []),
        (tomorrow(events=17_900, **dict(zip(KINDS, (5_370, 5_370, 7_160), strict=True))), []),
        (
            tomorrow(events=5_000, **dict(zip(KINDS, (1_500, 1_500, 2_000), strict=True))),
            ["events of a day: 5,000, and 10,000 then; nightly.max_day_factor is 1.8"],
        ),
        (
            tomorrow(events=20_000, **dict(zip(KINDS, (6_000, 6_000, 8_000), strict=True))),
            ["events of a day: 20,000, and 10,000 then; nightly.max_day_factor is 1.8"],
        ),
        (tomorrow(events=0, negative=0, positive=0, neutral=0), ["events of a day: 0, and 10,000 then"]),
        (
            tomorrow(negative=400, neutral=6_600),
            [
                "negative events, of all of a day: 4.0%, and 30.0% then; nightly.max_share_shift is 0.2",
                "neutral events",
            ],
        ),
        (tomorrow(repeated=5_000), ["events that repeat another, of all of a day: 50.0%, and 0.1% then"]),
        (tomorrow(new_users=4_900), ["users who are new, of all of a day: 98.0%, and 5.0% then"]),
        (tomorrow(new_items=1_000), ["items that are new, of all of a day: 50.0%, and 2.5% then"]),
        (tomorrow(until_earlier=126_000), ["events until then: 26,000 of 100,000 came late; nightly.max_past_change"]),
        (tomorrow(until_earlier=70_000), ["events until then: 30,000 of 100,000 are gone"]),
        (tomorrow(until_earlier=76_000), []),
    ],
)
def test_what_lies_too_far_is_told_and_nothing_else(now, told):
    found = list(findings(USUAL, now, LIMITS))
    assert len(found) == len(told)
    assert all(line.startswith(begins) for line, begins in zip(found, told, strict=True))


def test_every_limit_can_be_raised_so_far_that_all_is_taken():
    changed = tomorrow(until_earlier=900_000, events=40_000_000, negative=0, repeated=39_000_000, new_users=5_000)
    open_limits = NightlySettings(max_day_factor=1e9, max_share_shift=1, max_past_change=1e9)
    assert len(list(findings(USUAL, changed, LIMITS))) == 7
    assert list(findings(USUAL, changed, open_limits)) == []


def test_a_young_log_grows_old_in_peace():
    """Its users are new, then fewer of them are."""
    young = replace(USUAL, day={**USUAL.day, "new_users": 4_900, "new_items": 1_900, "repeated": 4_000})
    assert list(findings(young, tomorrow(), LIMITS)) == []
    assert len(list(findings(tomorrow(), young, LIMITS))) == 3


def test_small_numbers_say_nothing(monkeypatch):
    few = Feed(DAY_US, 900, 900, dict.fromkeys(USUAL.day, 900) | {"new_users": 0, "repeated": 0})
    none = Feed(2 * DAY_US, 0, 0, dict.fromkeys(USUAL.day, 0))
    assert list(findings(few, none, LIMITS)) == []
    monkeypatch.setattr(module, "LEAST", 900)
    assert len(list(findings(few, none, LIMITS))) == 2


@pytest.mark.parametrize("document", [None, {}, {"until_us": 1}, {**USUAL.to_json(), "day": {"events": 1}}, "text"])
def test_what_another_release_wrote_is_compared_with_nothing(document):
    assert Feed.read(document) is None
