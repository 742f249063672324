"""Boosted trees on pairs whose truth is known: what they learn, by whom they are chosen, and that they repeat."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from conrec.errors import MissingDependencyError, TooLittleDataError
from conrec.evaluation import trees as module
from conrec.evaluation.published import area
from conrec.evaluation.trees import TRIALS, TreeSettings, fit_trees

NAMES = ("bent", "noise: a, b", "level")
SMALL = TreeSettings(num_leaves=7, learning_rate=0.1, rounds=40, min_data_in_leaf=20)


def world(seed: int, users: int = 200, per_user: int = 10):
    """Log-odds 3 |bent| - 1.5 and nothing else: no line through the columns orders these pairs."""
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), per_user)
    columns = random.uniform(-1, 1, (len(owner), 3)).astype(np.float32)
    columns[random.random(columns.shape) < 0.05] = np.nan
    odds = 3 * np.abs(np.nan_to_num(columns[:, 0], nan=0.5)) - 1.5
    return columns, odds, random.random(len(owner)) < 1 / (1 + np.exp(-odds)), owner


def test_trees_learn_what_no_line_can_and_say_from_which_column() -> None:
    columns, _, rejected, users = world(0)
    trees = fit_trees(columns, NAMES, rejected, users, 0, [SMALL])
    others, odds, outcome, _ = world(1)
    scores = trees.scores(others)
    assert scores.dtype == np.float32
    assert scores.shape == (2000,)
    assert area(scores, outcome) > area(odds, outcome) - 0.03 > 0.65
    assert np.corrcoef(scores, odds)[0, 1] > 0.8
    gains = dict(zip(NAMES, trees.booster.feature_importance("gain"), strict=True))
    assert gains["bent"] > 0.6 * sum(gains.values())


def test_scores_are_log_odds() -> None:
    """A column of two values: the trees go to the log-odds of each, and through probabilities back again."""
    value = np.tile([0, 0, 0, 0, 1], 400).astype(np.float32)
    rejected = np.tile([1, 0, 0, 0, 1], 400).astype(bool)
    rejected[4::20] = False
    settings = TreeSettings(num_leaves=2, learning_rate=0.3, rounds=200, min_data_in_leaf=5)
    trees = fit_trees(value[:, None], ["value"], rejected, np.arange(2000), 0, [settings])
    np.testing.assert_allclose(trees.scores(np.array([[0], [1]], np.float32)), np.log([1 / 3, 3]), atol=0.02)


def test_equal_arguments_give_equal_trees() -> None:
    columns, _, rejected, users = world(2)
    first, second = (fit_trees(columns, NAMES, rejected, users, 3, TRIALS[:2]) for _ in range(2))
    assert (first.names, first.chosen, first.held_out_auc) == (second.names, second.chosen, second.held_out_auc)
    np.testing.assert_array_equal(first.scores(columns), second.scores(columns))
    assert first.booster.model_to_string() == second.booster.model_to_string()
    assert "[num_threads: 1]" in first.booster.model_to_string()


def test_a_monotone_transform_of_a_count_changes_nothing() -> None:
    """Where each value has a bin of its own."""
    columns, _, rejected, users = world(3)
    counts = np.round(columns * 50) + 60
    plain = fit_trees(counts, NAMES, rejected, users, 0, [SMALL])
    squared = fit_trees(counts**2, NAMES, rejected, users, 0, [SMALL])
    np.testing.assert_array_equal(squared.scores(counts**2), plain.scores(counts))
    assert np.ptp(plain.scores(counts)) > 1


def test_the_trial_of_the_largest_auc_on_held_out_users_is_fitted_on_everyone() -> None:
    columns, _, rejected, users = world(4)
    blind = TreeSettings(num_leaves=7, learning_rate=0.1, rounds=40, min_data_in_leaf=10_000)
    trials = [blind, SMALL, blind]
    found = fit_trees(columns, NAMES, rejected, users, 5, trials)
    held_out = module._held_out(users, 5)
    alone = fit_trees(columns[~held_out], NAMES, rejected[~held_out], users[~held_out], 5, [SMALL])
    expected = area(alone.scores(columns[held_out]), rejected[held_out])
    assert found.held_out_auc == pytest.approx((0.5, expected, 0.5), abs=1e-6)
    assert found.chosen == SMALL
    everyone = fit_trees(columns, NAMES, rejected, users, 5, [SMALL])
    np.testing.assert_array_equal(found.scores(columns), everyone.scores(columns))
    assert np.isnan(everyone.held_out_auc).all()


def test_held_out_are_whole_users_whatever_the_order_of_the_rows() -> None:
    random = np.random.default_rng(0)
    users = random.integers(1000, 1040, 500)
    mask = module._held_out(users, 0)
    assert not np.isin(users[mask], users[~mask]).any()
    assert len(np.unique(users[mask])) == 10
    order = random.permutation(500)
    np.testing.assert_array_equal(module._held_out(users[order], 0), mask[order])
    assert (module._held_out(users, 1) != mask).any()
    assert module._held_out(np.array([3, 3, 8]), 0).sum() in (1, 2)
    assert not module._held_out(np.array([3, 3, 3]), 0).any()


def test_choosing_by_rows_of_fitted_users_would_choose_worse() -> None:
    """Every user has a taste of their own and a column that names them: deep trees learn names, which help nobody."""
    random = np.random.default_rng(6)
    users = np.repeat(np.arange(100), 20)
    taste = random.normal(0, 3, 100)[users]
    columns = np.stack([users, random.normal(size=2000)], axis=1).astype(np.float32)
    rejected = random.random(2000) < 1 / (1 + np.exp(-taste - 2 * columns[:, 1]))
    deep = TreeSettings(num_leaves=63, learning_rate=0.1, rounds=200, min_data_in_leaf=3)
    shallow = TreeSettings(num_leaves=2, learning_rate=0.1, rounds=30, min_data_in_leaf=50)
    by_user = fit_trees(columns, ["who", "what"], rejected, users, 0, [deep, shallow])
    by_row = fit_trees(columns, ["who", "what"], rejected, np.arange(2000), 0, [deep, shallow])
    assert by_user.chosen == shallow
    assert by_row.chosen == deep


def test_where_held_out_users_decide_nothing_the_first_trial_stands() -> None:
    columns, _, rejected, users = world(7, users=8)
    rejected = np.where(module._held_out(users, 0), False, rejected)
    found = fit_trees(columns, NAMES, rejected, users, 0, TRIALS[:2])
    assert np.isnan(found.held_out_auc).all()
    assert found.chosen == TRIALS[0]
    single = fit_trees(columns, NAMES, rejected, np.zeros(len(users), int), 0, TRIALS[:2])
    assert np.isnan(single.held_out_auc).all() and len(single.held_out_auc) == 2


def test_few_rows_make_one_score_for_all() -> None:
    found = fit_trees(np.zeros((4, 1), np.float32), ["x"], np.array([1, 0, 0, 0], bool), np.arange(4), 0)
    np.testing.assert_allclose(found.scores(np.ones((2, 1), np.float32)), np.log([1 / 3, 1 / 3]), atol=1e-5)
    assert not found.booster.feature_importance("gain").any()
    assert found.scores(np.zeros((0, 1), np.float32)).shape == (0,)


def test_what_cannot_be_fitted_is_refused() -> None:
    columns, _, rejected, users = world(8, users=5)
    with pytest.raises(ValueError, match=r"columns have shape \(50, 3\) for 2 names"):
        fit_trees(columns, NAMES[:2], rejected, users, 0)
    with pytest.raises(ValueError, match="50 rows of columns, 49 outcomes and 50 users"):
        fit_trees(columns, NAMES, rejected[1:], users, 0)
    with pytest.raises(ValueError, match="there is no trial"):
        fit_trees(columns, NAMES, rejected, users, 0, [])
    for outcome in (np.zeros(50, bool), np.ones(50, bool)):
        with pytest.raises(TooLittleDataError, match=f"{outcome.sum()} of 50 pairs are rejected"):
            fit_trees(columns, NAMES, outcome, users, 0)
    with pytest.raises(ValueError, match=r"columns have shape \(50, 2\) for 3 names"):
        fit_trees(columns, NAMES, rejected, users, 0, [SMALL]).scores(columns[:, :2])


def test_without_lightgbm_the_error_says_what_to_install(monkeypatch) -> None:
    columns, _, rejected, users = world(9, users=5)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingDependencyError, match=r"^lightgbm: .*; in a checkout, make .venv/complete"):
        fit_trees(columns, NAMES, rejected, users, 0)


def test_lightgbm_says_nothing(capfd) -> None:
    columns, _, rejected, users = world(10, users=5)
    fit_trees(columns, NAMES, rejected, users, 0).scores(columns)
    assert capfd.readouterr() == ("", "")
