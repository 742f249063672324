"""The floor of every evaluation: boosted trees on counts, which a published list has to beat.

    trees = fit_trees(columns, names, rejected, users, seed=0)
    scores = trees.scores(columns_of_the_test)      # log-odds of a rejection, for conrec.evaluation.published

A row is a pair of a served list and an item, a column a number known at the time of the list, NaN where it is not.

Invariants: settings are chosen on users who are not fitted on, and the chosen ones are fitted again on everyone. Equal
arguments give equal scores: one thread, fixed seeds, and sums in one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conrec.errors import MissingDependencyError, TooLittleDataError
from conrec.evaluation.published import area
from conrec.evaluation.tuning import best_of


@dataclass(frozen=True)
class TreeSettings:
    """What is chosen on held-out users. `learning_rate` x `rounds` is how far the trees go together."""

    num_leaves: int
    learning_rate: float
    rounds: int
    min_data_in_leaf: int
    lambda_l2: float = 0.0
    feature_fraction: float = 1.0
    bagging_fraction: float = 1.0


_SAMPLED = {"lambda_l2": 10.0, "feature_fraction": 0.6, "bagging_fraction": 0.7}
"""What keeps trees from learning single rows: a ridge, and part of the columns and rows for each tree."""
TRIALS = (
    TreeSettings(num_leaves=15, learning_rate=0.05, rounds=200, min_data_in_leaf=50),
    TreeSettings(num_leaves=7, learning_rate=0.05, rounds=200, min_data_in_leaf=50),
    TreeSettings(num_leaves=31, learning_rate=0.03, rounds=500, min_data_in_leaf=200),
    TreeSettings(num_leaves=4, learning_rate=0.1, rounds=200, min_data_in_leaf=20),
    TreeSettings(num_leaves=4, learning_rate=0.05, rounds=200, min_data_in_leaf=100, **_SAMPLED),
    TreeSettings(num_leaves=7, learning_rate=0.05, rounds=200, min_data_in_leaf=100, **_SAMPLED),
    TreeSettings(num_leaves=15, learning_rate=0.05, rounds=200, min_data_in_leaf=100, **_SAMPLED),
    TreeSettings(num_leaves=7, learning_rate=0.03, rounds=600, min_data_in_leaf=100, **_SAMPLED),
)
"""What is tried when nothing is said, from trees of a few leaves to more than tens of thousands of pairs carry."""

# Share of the users on whom the settings are chosen.
_HELD_OUT = 0.25


@dataclass(frozen=True)
class Trees:
    """Fitted trees, the settings chosen for them, and the AUC on held-out users (T,) of each trial, NaN if undefined.

    `booster` is LightGBM's; names (C,) are those of the columns.
    """

    booster: Any
    names: tuple[str, ...]
    chosen: TreeSettings
    held_out_auc: tuple[float, ...]

    def scores(self, columns: np.ndarray) -> np.ndarray:
        """Log-odds of a rejection. Shape: columns (M, C) float32 -> (M,) float32.

        Raises ValueError when there are more or fewer columns than were fitted.
        """
        _check_columns(columns, self.names)
        if not len(columns):
            return np.zeros(0, np.float32)
        found = self.booster.predict(columns, raw_score=True, num_threads=1)
        return np.asarray(found, np.float32)


def fit_trees(
    columns: np.ndarray,
    names: Sequence[str],
    rejected: np.ndarray,
    users: np.ndarray,
    seed: int,
    trials: Sequence[TreeSettings] = TRIALS,
) -> Trees:
    """Trees with the settings of the largest AUC on a quarter of the users, the first of equals, fitted on all rows.

    Shape: columns (N, C) float32; names (C,); rejected (N,) bool; users (N,) int, equal for the rows of one user.
    Where the held-out users have only rejected or only liked pairs, the first trial stands.
    Raises ValueError when shapes disagree or there is no trial, `TooLittleDataError` when nobody or everybody rejects,
    `MissingDependencyError` without LightGBM.
    """
    _check_columns(columns, names)
    if not len(columns) == len(rejected) == len(users):
        raise ValueError(
            f"{len(columns)} rows of columns, {len(rejected)} outcomes and {len(users)} users; give one each per pair"
        )
    if not trials:
        raise ValueError("there is no trial; give the settings of at least one")
    if rejected.all() or not rejected.any():
        raise TooLittleDataError(
            f"{np.count_nonzero(rejected)} of {len(rejected)} pairs are rejected; trees need rejected and liked pairs: "
            "fit them on a longer stretch of the log"
        )
    held_out = _held_out(users, seed)
    aucs = []
    # With one trial there is nothing to choose, without a fitted side nothing to choose by.
    for settings in trials if held_out.any() and len(trials) > 1 else ():
        booster = _boosted(columns[~held_out], rejected[~held_out], settings, seed)
        aucs.append(area(booster.predict(columns[held_out], raw_score=True, num_threads=1), rejected[held_out]))
    aucs = aucs or [np.nan] * len(trials)
    chosen = trials[best_of(aucs)]
    return Trees(_boosted(columns, rejected, chosen, seed), tuple(names), chosen, tuple(aucs))


def _held_out(users: np.ndarray, seed: int) -> np.ndarray:
    """Rows (N,) of a quarter of the users, whatever the order of the rows; none of a single user's."""
    distinct, row = np.unique(users, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    count = max(round(_HELD_OUT * len(distinct)), 1) if len(distinct) > 1 else 0
    return np.asarray(np.isin(row, order[:count]))


def _boosted(columns: np.ndarray, rejected: np.ndarray, settings: TreeSettings, seed: int) -> Any:
    """LightGBM's booster for one setting."""
    try:
        import lightgbm
    except (ImportError, OSError) as error:
        # An OSError is its OpenMP library: the wheel does not bring one.
        why = f"{error} (libgomp is Debian's package libgomp1)" if isinstance(error, OSError) else error
        raise MissingDependencyError.of("lightgbm", why) from error
    parameters = {name: value for name, value in asdict(settings).items() if name != "rounds"} | {
        "objective": "binary",
        "bagging_freq": 1,
        "seed": seed,
        "num_threads": 1,
        "deterministic": True,
        "force_row_wise": True,
        "verbose": -1,
    }
    return lightgbm.train(parameters, lightgbm.Dataset(columns, rejected), num_boost_round=settings.rounds)


def _check_columns(columns: np.ndarray, names: Sequence[str]) -> None:
    if columns.ndim != 2 or columns.shape[1] != len(names):
        raise ValueError(f"columns have shape {columns.shape} for {len(names)} names; give one name per column")
