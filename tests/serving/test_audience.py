"""Holdout and canary: the same users for ever, whichever way they are asked for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conrec.buckets import user_buckets
from conrec.serving.audience import in_holdout, in_holdout_one, predictions_for, released, released_one

USERS = pa.array([f"user{number}" for number in range(20_000)])
FORMS = [(in_holdout, in_holdout_one), (released, released_one)]


@pytest.mark.parametrize(("many", "one"), FORMS)
@given(users=st.lists(st.text(max_size=20)), share=st.floats(0, 1))
def test_both_forms_agree(many, one, users, share):
    assert many(pa.array(users, pa.string()), share).tolist() == [one(user, share) for user in users]


@pytest.mark.parametrize(("many", "one"), FORMS)
def test_a_larger_share_contains_a_smaller_one(many, one):
    reached = np.stack([many(USERS, share) for share in (0.0, 0.01, 0.1, 0.5, 1.0)])
    assert (np.diff(reached.astype(int), axis=0) >= 0).all()
    assert not reached[0].any()
    assert reached[-1].all()
    assert reached.mean(axis=1) == pytest.approx([0, 0.01, 0.1, 0.5, 1], abs=0.01)


def test_holdout_and_release_and_buckets_are_independent():
    held, reached = in_holdout(USERS, 0.5), released(USERS, 0.5)
    assert (held & reached).mean() == pytest.approx(0.25, abs=0.02)
    assert np.bincount(user_buckets(USERS, 2)[held]).tolist() == pytest.approx([5000, 5000], rel=0.05)
    assert predictions_for(USERS, 0.5, 0.5).tolist() == (reached & ~held).tolist()


def test_the_users_never_change_between_releases():
    """A user who left the holdout would no longer be one who saw everything: these are part of the format."""
    names = pa.array([f"user{number}" for number in range(400)])
    assert np.flatnonzero(in_holdout(names, 0.01)).tolist() == [1, 108, 132, 198, 296]
    assert np.flatnonzero(released(names, 0.01)).tolist() == [183, 202, 281, 286, 300, 321]


def test_a_slice_is_drawn_as_itself():
    assert in_holdout(USERS.slice(7), 0.3).tolist() == in_holdout(USERS, 0.3).tolist()[7:]
