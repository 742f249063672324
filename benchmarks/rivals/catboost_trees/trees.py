"""CatBoost on the columns and pairs of the boosted trees of an evaluation, in an environment of its own.

    python -m venv /tmp/catboost && /tmp/catboost/bin/pip install -r benchmarks/rivals/catboost_trees/requirements.txt
    /tmp/catboost/bin/python benchmarks/rivals/catboost_trees/trees.py --pairs runs/anchors --seed 0

Reads what benchmarks/rivals/pairs.py wrote, tries as many settings as LightGBM has, on the same users, and leaves
`told/CatBoost.parquet` for `conrec evaluate --predictions` and `told/CatBoost.json`. One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from catboost import CatBoostClassifier

sys.path.insert(0, str(Path(__file__).parents[1]))

from given import Given, area, tuned


@dataclass(frozen=True)
class Trial:
    """Oblivious trees of 2 ** depth leaves; `rsm` is the share of the columns, `subsample` of the rows of a tree."""

    depth: int
    learning_rate: float
    iterations: int
    l2_leaf_reg: float = 3.0
    rsm: float = 1.0
    subsample: float = 0.8


SAMPLED = {"l2_leaf_reg": 10.0, "rsm": 0.6, "subsample": 0.7}
TRIALS = (
    Trial(4, 0.05, 200),
    Trial(3, 0.05, 200),
    Trial(5, 0.03, 500),
    Trial(2, 0.1, 200),
    Trial(2, 0.05, 200, **SAMPLED),
    Trial(3, 0.05, 200, **SAMPLED),
    Trial(4, 0.05, 200, **SAMPLED),
    Trial(3, 0.03, 600, **SAMPLED),
)
"""LightGBM's eight, leaf counts to the nearest power of two."""


def main() -> None:
    """Tunes, fits and tells."""
    parser = argparse.ArgumentParser(description="CatBoost on the pairs of pairs.py")
    parser.add_argument("--pairs", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    given, seed = Given.read(arguments.pairs), arguments.seed
    columns, rejected = given.columns(given.fit), given.rejected

    def measured(trial: Trial, held_out: np.ndarray) -> tuple[float, dict[str, Any]]:
        model = fitted(columns[~held_out], rejected[~held_out], trial, seed)
        return area(scores_of(model, columns[held_out]), rejected[held_out]), {}

    best, trials = tuned(TRIALS, given, seed, measured)
    began = time.perf_counter()
    model = fitted(columns, rejected, TRIALS[best], seed)
    training = time.perf_counter() - began
    asked = given.columns(given.asked)
    began = time.perf_counter()
    scores = scores_of(model, asked)
    seconds = time.perf_counter() - began
    figures = {
        "chosen": asdict(TRIALS[best]),
        "training_seconds": round(training, 1),
        "parameters": int(model.tree_count_ * 2 ** TRIALS[best].depth),
        "users_per_second": round(len(set(given.asked["user_id"].to_pylist())) / seconds),
        "trials": trials,
    }
    given.tell("CatBoost", scores, figures)


def fitted(columns: np.ndarray, rejected: np.ndarray, trial: Trial, seed: int) -> Any:
    """One fit."""
    model = CatBoostClassifier(
        **asdict(trial),
        bootstrap_type="Bernoulli",
        random_seed=seed,
        thread_count=1,
        verbose=False,
        allow_writing_files=False,
    )
    return model.fit(columns, rejected.astype(int))


def scores_of(model: Any, columns: np.ndarray) -> np.ndarray:
    """Log-odds of a rejection. Shape: (M, C) -> (M,)."""
    return np.asarray(model.predict(columns, prediction_type="RawFormulaVal", thread_count=1))


if __name__ == "__main__":
    main()
