"""Every measure on a world small enough for paper, and intervals against a known truth."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conrec.config import EvaluationSettings
from conrec.evaluation.leaf_items import ranked_items, scored_items
from conrec.evaluation.metrics import (
    exclude,
    exclude_scored,
    figure_of,
    members,
    of_window,
    paired_difference,
    per_anchor,
    summarise,
)
from conrec.ragged import Ragged

SETTINGS = EvaluationSettings(long_tail_user=3, long_tail_item=5)


def ragged(rows: list[list[int]]) -> Ragged:
    return Ragged.from_lengths(
        np.array(list(chain.from_iterable(rows)), np.int32), np.array([len(row) for row in rows])
    )


def world() -> tuple[SimpleNamespace, np.ndarray, np.ndarray]:
    """Four anchors over eight items; item 7 is the only one rejected fewer than five times in training."""
    targets = SimpleNamespace(
        next_negative=np.array([0, 3, 7, -1], np.int32),
        future_negatives=ragged([[0, 1, 2], [3, 7], [7], []]),
        future_positives=ragged([[4], [5, 6], [], [6]]),
    )
    negatives_in_history = np.array([2, 3, 1, 9])
    training_rejections = np.array([9, 9, 9, 5, 9, 9, 9, 4])
    return targets, negatives_in_history, training_rejections


def test_measures_have_the_values_computed_on_paper() -> None:
    ranked = np.array([[1, 2], [3, 5], [4, -1], [6, 0]], np.int32)
    values = per_anchor(ranked, *world(), SETTINGS)
    nan = np.nan
    expected = {
        "HR": [0, 1, 0, nan],
        "FHR": [1, 1, 0, nan],
        # Two of three found with two places; one of two; none of one.
        "FRecall": [1, 0.5, 0, nan],
        # Users 0 and 2 rejected fewer than three items.
        "LUF": [1, nan, 0, nan],
        # Anchors 1 and 2 reject item 7 later; nobody predicted it.
        "LIF": [nan, 0, 0, nan],
        # Anchor 2 likes nothing later.
        "FPH": [0, 1, nan, 1],
    }
    assert values.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(values[name], column, err_msg=name)
    window = of_window(ranked, world()[0])
    assert window.keys() == {"FHR", "FPH", "FRecall"}
    for name, column in window.items():
        np.testing.assert_array_equal(values[name], column, err_msg=name)

    figures = summarise(values, np.arange(4), resamples=200, seed=0)
    assert figures["FHR"]["value"] == pytest.approx(2 / 3)
    assert figures["FPH"]["value"] == pytest.approx(2 / 3)
    assert figures["Lift"]["value"] == pytest.approx(1)


def test_a_hit_on_the_long_tail_item_counts_for_lif_only_there() -> None:
    ranked = np.array([[7, 0], [7, 0], [0, 1], [7, 0]], np.int32)
    values = per_anchor(ranked, *world(), SETTINGS)
    np.testing.assert_array_equal(values["LIF"], [np.nan, 1, 0, np.nan])


def test_an_oracle_scores_one_and_an_inverted_oracle_zero() -> None:
    targets, history, rejections = world()
    oracle = np.array([[0, 1, 2], [3, 7, -1], [7, -1, -1], [-1, -1, -1]], np.int32)
    figures = summarise(per_anchor(oracle, targets, history, rejections, SETTINGS), np.arange(4), 50, 0)
    for name in ("HR", "FHR", "FRecall", "LUF", "LIF"):
        assert figures[name] == {"value": 1, "low": 1, "high": 1}, name
    assert figures["FPH"]["value"] == 0
    assert figures["Lift"]["value"] == np.inf

    inverted = np.array([[4, -1], [5, 6], [-1, -1], [6, -1]], np.int32)
    figures = summarise(
        per_anchor(inverted, targets, history, rejections, SETTINGS),
        np.arange(4),
        50,
        0,
    )
    for name in ("HR", "FHR", "FRecall", "LUF", "LIF", "Lift"):
        assert figures[name]["value"] == 0, name
    assert figures["FPH"]["value"] == 1


def test_an_empty_prediction_hits_nothing_not_even_the_missing_next_negative() -> None:
    values = per_anchor(np.full((4, 2), -1, np.int32), *world(), SETTINGS)
    for name, column in values.items():
        assert np.nansum(column) == 0, name


def test_a_repeated_prediction_is_refused() -> None:
    ranked = np.array([[1, 2], [3, 3], [4, -1], [-1, -1]], np.int32)
    with pytest.raises(ValueError, match="anchor 1 is predicted an item twice"):
        per_anchor(ranked, *world(), SETTINGS)


def test_rows_that_do_not_belong_together_are_refused() -> None:
    targets, history, rejections = world()
    with pytest.raises(ValueError, match="negatives_in_history has 3 rows for 4"):
        per_anchor(np.zeros((4, 1), np.int32), targets, history[:3], rejections, SETTINGS)


def test_exclude_keeps_order_and_pads() -> None:
    ranked = np.array([[5, 4, 3, 2], [0, 1, -1, -1], [3, 2, 1, 0]], np.int32)
    left = exclude(ranked, ragged([[4, 9], [0], []]), k=3)
    np.testing.assert_array_equal(left, [[5, 3, 2], [1, -1, -1], [3, 2, 1]])
    assert left.dtype == np.int32
    np.testing.assert_array_equal(exclude(ranked[:, :2], ragged([[], [], []]), k=3)[:, 2], [-1, -1, -1])


@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 9)),
            st.lists(st.integers(-1, 9), min_size=4, max_size=4),
        ),
        min_size=1,
    )
)
def test_members_equals_python_sets(rows: list[tuple[set[int], list[int]]]) -> None:
    sets = ragged([list(chosen) for chosen, _ in rows])
    items = np.array([asked for _, asked in rows], np.int32)
    expected = [[item in chosen for item in asked] for chosen, asked in rows]
    np.testing.assert_array_equal(members(sets, items), expected)


def test_intervals_cover_the_truth_at_about_the_nominal_rate() -> None:
    """200 worlds of 150 users with a rate of their own and one to three anchors: 95 % of intervals hold the mean.

    Treating anchors as independent would cover far less, since a user's anchors agree.
    """
    rng = np.random.default_rng(3)
    covered = 0
    for world_seed in range(200):
        rates = rng.beta(0.3, 0.7, 150)
        users = np.repeat(np.arange(150), rng.integers(1, 4, 150))
        hits = (rng.random(len(users)) < rates[users]).astype(float)
        figure = summarise({"FHR": hits}, users, resamples=300, seed=world_seed)["FHR"]
        covered += figure["low"] <= 0.3 <= figure["high"]
    # Binomial(200, .95) lies in here with probability above .999; the percentile interval loses a point or two.
    assert 178 <= covered <= 199


def test_anchors_of_one_user_are_resampled_together() -> None:
    hits = np.repeat([0.0, 1.0] * 10, 50)
    by_user = summarise({"FHR": hits}, np.repeat(np.arange(20), 50), 500, 0)["FHR"]
    by_anchor = summarise({"FHR": hits}, np.arange(1000), 500, 0)["FHR"]
    assert by_user["high"] - by_user["low"] > 4 * (by_anchor["high"] - by_anchor["low"])


def test_paired_difference_cancels_what_users_share() -> None:
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base == 0)[:12]] = 1
    users = np.arange(400)
    ours, theirs = {"FHR": better, "FPH": base}, {"FHR": base, "FPH": base}
    difference = paired_difference(ours, theirs, users, 500, 0)
    assert difference["FHR"]["value"] == pytest.approx(12 / 400)
    assert difference["FHR"]["low"] > 0
    assert difference["FPH"] == {"value": 0, "low": 0, "high": 0}
    assert difference["Lift"]["value"] == pytest.approx(12 / 400 / base.mean())
    alone = summarise(ours, users, 500, 0)["FHR"]
    assert alone["low"] < base.mean(), "without pairing the difference would not show"


def test_paired_difference_refuses_other_anchors() -> None:
    one = {"FHR": np.array([1.0, np.nan])}
    two = {"FHR": np.array([1.0, 0.0])}
    with pytest.raises(ValueError, match="FHR is defined for other anchors"):
        paired_difference(one, two, np.arange(2), 10, 0)
    with pytest.raises(ValueError, match="only one of the two systems has FPH"):
        paired_difference(one, {**one, "FPH": np.zeros(2)}, np.arange(2), 10, 0)


def test_a_measure_nobody_defines_is_nan_not_zero() -> None:
    figure = summarise({"LIF": np.full(3, np.nan)}, np.arange(3), 20, 0)["LIF"]
    assert np.isnan([figure["value"], figure["low"], figure["high"]]).all()


def test_scores_stay_beside_what_is_kept() -> None:
    ranked = np.array([[5, 3, 9, 1], [2, -1, -1, -1], [7, 8, 4, 6]], np.int32)
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.3, 0.2], [4, 3, 2, 1]], np.float32)
    excluded = ragged([[3], [2], []])
    items, kept = exclude_scored(ranked, scores, excluded, k=2)
    assert items.tolist() == [[5, 9], [-1, -1], [7, 8]]
    np.testing.assert_array_equal(kept, np.array([[0.9, 0.7], [-np.inf, -np.inf], [4, 3]], np.float32))
    assert items.dtype == np.int32 and kept.dtype == np.float32
    np.testing.assert_array_equal(exclude(ranked, excluded, k=2), items)
    wide = exclude_scored(ranked, scores, excluded, k=6)
    assert wide[0][0].tolist() == [5, 9, 1, -1, -1, -1]
    np.testing.assert_array_equal(wide[1][0], np.array([0.9, 0.7, 0.6, -np.inf, -np.inf, -np.inf], np.float32))


def test_items_take_the_score_of_their_semantic_id_and_their_share_in_it() -> None:
    """Leaf 0 holds items 5 and 1, leaf 1 item 2, leaf 2 items 3 and 4; the last leaf is no padding."""
    leaf_items = ragged([[5, 1], [2], [3, 4]])
    leaves = np.array([[2, 0, -1], [1, -1, -1], [-1, -1, -1]])
    scores = np.array([[-1.0, -2.0, -np.inf], [-3.0, -np.inf, -np.inf], [-np.inf] * 3], np.float32)
    shares = np.array([0, -1.5, 0, -2, -0.25, -0.5], np.float32)
    excluded = ragged([[4], [], [1]])
    items, kept = scored_items(leaves, scores, leaf_items, shares, excluded, k=3)
    assert items.tolist() == [[5, 3, 1], [2, -1, -1], [-1, -1, -1]]
    empty = -np.inf
    assert kept.tolist() == [[-2.5, -3, -3.5], [-3, empty, empty], [empty, empty, empty]]
    assert ranked_items(leaves, leaf_items, excluded, k=2).tolist() == [[3, 5], [2, -1], [-1, -1]]
    nobody = scored_items(leaves[:0], scores[:0], leaf_items, shares, ragged([]), k=3)
    assert nobody[0].shape == nobody[1].shape == (0, 3)


def test_a_figure_takes_observed_ends_and_leaves_out_what_is_undefined() -> None:
    drawn = np.array([5.0, np.nan, 1.0, np.inf, 3.0])
    assert figure_of(2.0, drawn) == {"value": 2.0, "low": 1.0, "high": np.inf}
    undefined = figure_of(2.0, np.full(3, np.nan))
    assert undefined["value"] == 2 and np.isnan([undefined["low"], undefined["high"]]).all()
