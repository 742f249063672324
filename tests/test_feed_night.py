"""A night whose log is not like that of the night before is refused, and says what to do."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from conrec.artefact import plan
from conrec.config import DAY_US, Config, NightlySettings
from conrec.errors import DataError
from conrec.feedback.events import CODED
from conrec.feedback.feed import Feed
from conrec.feedback.log import divided
from conrec.stages.feed import FEED, fed

DAY = np.arange(1000) * (DAY_US // 1000) + 1


def log_of(days, kinds=3):
    """A thousand users who did one thing on each of the days, of so many kinds."""
    times = np.concatenate([DAY + day * DAY_US for day in days])
    users = pa.array([f"user{number % 1000}" for number in range(len(times))]).dictionary_encode()
    columns = [users, np.arange(len(times)) % 7, times, np.arange(len(times)) % kinds]
    arrays = [pa.array(column, kind) for column, kind in zip(columns[1:], CODED.types[1:], strict=True)]
    return divided([pa.table([users, *arrays], schema=CODED)], 3)


def config(tmp_path, **nightly):
    """Of no log: what is read of it is given."""
    return Config.model_construct(
        root=str(tmp_path), interactions=type("Log", (), {"path": "the-log"}), nightly=NightlySettings(**nightly)
    )


def leave(tmp_path, number, log, **figures):
    night = plan(str(tmp_path), "nightly", {"number": number}, {})
    night.finish({FEED: fed(config(tmp_path), log, 7).to_json()} | figures, 0.0)


def test_a_night_is_held_against_the_one_whose_log_ends_last_before_it(tmp_path):
    plan(str(tmp_path), "nightly", {}, {}).finish({"of": "an older release"}, 0.0)
    leave(tmp_path, 1, log_of([0, 1, 2, 3, 3, 3, 3]), version="a")
    leave(tmp_path, 2, log_of(range(3)), version="b")  # made later, of an earlier moment
    refused, latest = plan(str(tmp_path), "nightly", {"number": 3}, {}), log_of(range(5))  # by the audit
    refused.finish({FEED: Feed.of(latest, 7, latest.last_us, None).to_json()}, 0.0)
    with pytest.raises(DataError) as refused:
        fed(config(tmp_path), log_of(range(5)), 7)
    lines = str(refused.value).splitlines()
    assert lines[0] == "the-log: is not like the log that the night until 1970-01-04 23:58 was fed:"
    assert [line.split(";")[0] for line in lines[1:-1]] == [
        "  events of a day: 1,000, and 4,000 then",
        "  events until then: 3,000 of 7,000 are gone",
    ]
    assert "--set nightly.max_day_factor=100" in lines[-1]
    raised = config(tmp_path, max_day_factor=100, max_past_change=0.5)
    leave_of = fed(raised, log_of(range(5)), 7)
    assert (leave_of.events, leave_of.until_earlier, leave_of.day["events"]) == (5_000, 4_000, 1_000)


def test_nights_of_one_log_follow_each_other(tmp_path):
    for day in range(2, 6):
        leave(tmp_path, day, log_of(range(day)), version=str(day))
    with pytest.raises(DataError, match=r"negative events, of all of a day: 100\.0%, and 33\.3% then"):
        fed(config(tmp_path), log_of(range(6), kinds=1), 7)
