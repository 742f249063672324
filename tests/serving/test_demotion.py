"""A row blocks, demotes, ends."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conrec.serving.demotion import multiplier

DAY = 86_400_000_000
NOW = 1_700_000_000_000_000


def days(*values):
    return np.array([NOW + round(value * DAY) for value in values], np.int64)


def test_it_rises_from_the_end_of_blocking_to_the_expiry():
    demotes, expires = days(1, 0, -1, -3, -4, -5), days(5, 4, 3, 1, 0, -1)
    assert multiplier(NOW, demotes, expires).tolist() == [0.0, 0.0, 0.25, 0.75, 1.0, 1.0]


def test_without_demotion_it_ends_at_once():
    assert multiplier(NOW, days(1, 0, -1), days(1, 0, -1)).tolist() == [0.0, 1.0, 1.0]
    assert multiplier(NOW - 1, days(0), days(0)).tolist() == [0.0]


def test_a_row_that_ends_before_it_demotes_has_ended():
    """No audit lets it through; a reader must not hide what has ended."""
    assert multiplier(NOW, days(2), days(-1)).tolist() == [1.0]


def test_no_rows():
    assert multiplier(NOW, days(), days()).tolist() == []


@given(st.integers(0, 2 * 10**15), st.integers(0, 2 * 10**15), st.integers(0, 10**15), st.integers(0, 10**15))
def test_it_never_falls_with_time_and_never_leaves_its_bounds(now, demotes, lasts, later):
    at = [multiplier(time, np.array([demotes]), np.array([demotes + lasts]))[0] for time in (now, now + later)]
    assert 0 <= at[0] <= at[1] <= 1
