"""Trees over a grid of users and items, beside LightGBM row by row."""

import numpy as np
import pytest

from conrec.evaluation.tree_grid import grid_scores
from conrec.evaluation.trees import TRIALS, TreeSettings, fit_trees

NAMES = ("leaning", "events", "shown", "rejected", "user x category")
USERS, ITEMS, KEYS = 23, 57, 5


def world(values, seed=0):
    """Columns by user, by item and by key, some values equal to those that are fitted on; and the rows of all pairs."""
    rng = np.random.default_rng(seed)
    of_users = {name: rng.choice(values, USERS) for name in NAMES[:2]}
    of_items = {name: rng.choice(values, ITEMS) for name in NAMES[2:4]}
    by_key, keys = rng.choice(values, (USERS, KEYS)), rng.integers(0, KEYS, ITEMS)
    rows = np.stack(
        [
            *(np.broadcast_to(column[:, None], (USERS, ITEMS)) for column in of_users.values()),
            *(np.broadcast_to(column, (USERS, ITEMS)) for column in of_items.values()),
            by_key[:, keys],
        ],
        axis=-1,
    )
    return (of_users, of_items, {NAMES[4]: (by_key, keys)}), rows.reshape(-1, len(NAMES))


@pytest.mark.parametrize("settings", TRIALS)
def test_every_pair_has_the_score_that_lightgbm_gives_its_row(settings, monkeypatch):
    monkeypatch.setattr("conrec.evaluation.tree_grid._PAIRS_AT_ONCE", 3 * ITEMS)
    rng = np.random.default_rng(1)
    fitted = rng.normal(size=(1500, len(NAMES))).astype(np.float32)
    # Zero is a threshold of its own, and what is missing would be taken for it.
    fitted[rng.random(fitted.shape) < 0.1] = 0
    rejected = rng.random(len(fitted)) < 1 / (1 + np.exp(-fitted[:, 0] * fitted[:, 2] - fitted[:, 4]))
    trees = fit_trees(fitted, NAMES, rejected, rng.integers(0, 150, len(fitted)), 0, [settings])
    grid, rows = world(np.concatenate([fitted[:40].ravel(), [0, -0.0, 1e-38]]).astype(np.float32))
    assert np.array_equal(grid_scores(trees, *grid).ravel(), trees.scores(rows))


def test_trees_without_a_split_say_the_same_of_everybody():
    rng = np.random.default_rng(2)
    fitted = np.zeros((200, len(NAMES)), np.float32)
    trees = fit_trees(fitted, NAMES, rng.random(200) < 0.5, np.arange(200), 0, [TRIALS[0]])
    grid, rows = world(np.ones(3, np.float32))
    assert np.array_equal(grid_scores(trees, *grid).ravel(), trees.scores(rows))


def test_larger_trees_than_masks_hold_are_refused():
    rng = np.random.default_rng(3)
    fitted = rng.normal(size=(3000, len(NAMES))).astype(np.float32)
    settings = TreeSettings(num_leaves=33, learning_rate=0.1, rounds=1, min_data_in_leaf=5)
    rejected = rng.random(3000) < 1 / (1 + np.exp(-fitted.sum(axis=1)))
    trees = fit_trees(fitted, NAMES, rejected, np.arange(3000), 0, [settings])
    with pytest.raises(ValueError, match="a tree of 33 leaves; masks hold 32"):
        grid_scores(trees, *world(np.ones(3, np.float32))[0])
