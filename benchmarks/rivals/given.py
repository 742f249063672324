"""What rivals with an environment of their own are given and leave: files alone, nothing of conrec. numpy and pyarrow.

    given = Given.read(Path("runs/anchors"))                # what `pairs.py` wrote
    chosen, trials = tuned(TRIALS, given, seed, fit)        # on the users that LightGBM is chosen on
    given.tell("CatBoost", scores, {"trials": trials})

Invariant: trials are measured on the same quarter of the users, by the same area, as those of the boosted trees of an
evaluation (`conrec.evaluation.trees`; a test compares them), and nothing asked has an outcome here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

HELD_OUT = 0.25
"""Share of the users on whom a trial is measured."""
NAMED = ("user_id", "anchor_time", "item_id", "was_rejected")
"""Columns of a pair that no model reads as numbers."""


@dataclass(frozen=True)
class Given:
    """Pairs to learn from and pairs to answer, with the same columns."""

    folder: Path
    fit: pa.Table
    asked: pa.Table

    @classmethod
    def read(cls, folder: Path) -> Given:
        """Raises SystemExit with the remedy where `pairs.py` did not run."""
        for name in ("fit", "asked"):
            if not (folder / f"{name}.parquet").exists():
                raise SystemExit(f"{folder}/{name}.parquet is missing: run benchmarks/rivals/pairs.py --out {folder}")
        return cls(folder, *(parquet.read_table(folder / f"{name}.parquet") for name in ("fit", "asked")))

    @property
    def names(self) -> list[str]:
        """The columns that are read, in order."""
        return [name for name in self.asked.column_names if name not in NAMED]

    def columns(self, pairs: pa.Table) -> np.ndarray:
        """Shape: (N, C) float32."""
        return np.stack([pairs[name].to_numpy() for name in self.names], axis=1).astype(np.float32)

    @cached_property
    def rejected(self) -> np.ndarray:
        """What became of the pairs to learn from. Shape: (N,) bool."""
        return np.asarray(self.fit["was_rejected"].to_numpy(zero_copy_only=False), bool)

    def held_out(self, seed: int) -> np.ndarray:
        """Pairs (N,) of a quarter of the users, by name in order: the same users whatever reads them."""
        distinct, row = np.unique(self.fit["user_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(distinct))
        count = max(round(HELD_OUT * len(distinct)), 1) if len(distinct) > 1 else 0
        return np.isin(row, order[:count])

    def tell(self, name: str, scores: np.ndarray, figures: dict[str, Any]) -> None:
        """Leaves scores (N,) of the asked pairs as `conrec evaluate --predictions` reads them, and what they cost."""
        (self.folder / "told").mkdir(exist_ok=True)
        table = self.asked.select(["user_id", "anchor_time", "item_id"])
        table = table.append_column("score", pa.array(np.asarray(scores, np.float64)))
        parquet.write_table(table, self.folder / "told" / f"{name}.parquet")
        (self.folder / "told" / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(json.dumps(figures, indent=2))


def area(scores: np.ndarray, rejected: np.ndarray) -> float:
    """Share of rejected and liked pairs that are in order, ties count half; NaN where a side is empty. Shape: (N,)."""
    values, place = np.unique(scores, return_inverse=True)
    liked = np.bincount(place[~rejected], minlength=len(values))
    below = np.cumsum(liked) - liked / 2
    ordered = (below[place[rejected]]).sum()
    pairs = np.count_nonzero(rejected) * np.count_nonzero(~rejected)
    return float(ordered / pairs) if pairs else float("nan")


def tuned(
    trials: Sequence[Any], given: Given, seed: int, measured: Callable[[Any, np.ndarray], tuple[float, dict[str, Any]]]
) -> tuple[int, list[dict[str, Any]]]:
    """Position of the trial of the largest held-out area, the first of equals, and what each said and took.

    `measured(trial, held_out)` fits on the rest; its area, and what else is to be told. Trials are dataclasses.
    """
    held_out, told = given.held_out(seed), []
    for trial in trials:
        began = time.perf_counter()
        found, more = measured(trial, held_out)
        seconds = round(time.perf_counter() - began, 1)
        told.append(asdict(trial) | more | {"held_out_auc": found, "seconds": seconds})
        print(told[-1], flush=True)
    return int(np.argmax(np.nan_to_num([one["held_out_auc"] for one in told]))), told


def latest_items(pairs: pa.Table, events: pa.Table, item_ids: pa.ChunkedArray, most: int) -> np.ndarray:
    """The latest items of the user of each pair until its anchor, newest first. Shape: (N, most), -1 padding."""
    users = pc.unique(events["user_id"])
    rows, times = places(events["user_id"], users), events["timestamp"].cast(pa.int64()).to_numpy()
    order = np.lexsort((times, rows))
    rows, times, items = rows[order], times[order], places(events["item_id"], item_ids)[order]
    asked, moments = places(pairs["user_id"], users), pairs["anchor_time"].cast(pa.int64()).to_numpy()
    # Behind the last event of the user that lies at or before the moment.
    moment, found = np.unique(moments, return_inverse=True)
    ends = np.stack([np.searchsorted(rows * 2 + (times > time), np.arange(len(users)) * 2 + 1) for time in moment])
    starts = np.searchsorted(rows, np.arange(len(users)))
    at = np.maximum(asked, 0)
    place = ends[found, at][:, None] - 1 - np.arange(most)
    real = (place >= starts[at][:, None]) & (asked >= 0)[:, None]
    return np.where(real, items[np.maximum(place, 0)], -1)


def places(values: pa.ChunkedArray, of: Any) -> np.ndarray:
    """Position of each value, -1 where there is none. Shape: (N,) int64."""
    return np.asarray(pc.fill_null(pc.index_in(values, value_set=pa.array(of.to_pylist())), -1)).astype(np.int64)
