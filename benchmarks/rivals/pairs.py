"""The very pairs and columns that the boosted trees of an evaluation are fitted on and asked about, as files.

    .venv/bin/conrec anchors --config examples/kuairand/conrec.toml --set root=runs/kuairand --out runs/anchors
    .venv/bin/python benchmarks/rivals/pairs.py --config examples/kuairand/conrec.toml --out runs/anchors \\
        root=runs/kuairand

Writes below the folder, beside what `conrec anchors` wrote:

- `fit.parquet`: `user_id`, `anchor_time`, `item_id`, `was_rejected`, and the columns: what those who do not calibrate
  rejected or liked between the validation time and the cut, as it was known at the validation time;
- `asked.parquet`: the rows of pairs.parquet with the columns, as known at the cut;
- `told/LightGBM.parquet` and `told/counted odds.parquet`: what the floor of the headline and our score without a policy
  say of these pairs, to stand beside;
- `told/pairs.json`: what LightGBM was chosen from, and seconds.

No outcome of an asked pair is in any of them. Needs a finished catalogue of both cuts and no policy. Further arguments
are settings.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.config import load_settings
from conrec.evaluation.predictions import Task
from conrec.evaluation.published_lists import tree_columns
from conrec.evaluation.trees import TRIALS, fit_trees
from conrec.stages.artefacts import Artefacts
from conrec.stages.scoring import load_fitting
from conrec.stages.systems import load_world


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description="pairs and columns of the boosted trees")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("settings", nargs="*", help="section.setting=value")
    arguments = parser.parse_args()
    run = Artefacts(load_settings(arguments.config, arguments.settings))
    fitting, world = load_fitting(run), load_world(run)
    names = tree_columns(fitting.counts)
    answered, rejected, users = fitting.answers()
    items = fitting.answered_items()
    columns = np.stack([answered[name] for name in names], axis=1)
    at = np.full(len(users), run.config.timeline.validation_us)
    pairs = named(fitting.events.users, users, at, fitting.catalogue.item_ids, items)
    known = with_columns(pairs, columns, names).append_column("was_rejected", pa.array(rejected))
    storage.write_table(known, path(arguments.out, "fit"))

    task, counts = world.task, world.counts(run.config.timeline.cut_us)
    asked = task_pairs(task)
    of_pairs = counts.columns(world.anchors.users[task.pair_anchors], task.pair_items)
    shown = np.stack([of_pairs[name] for name in names], axis=1)
    storage.write_table(with_columns(asked, shown, names), path(arguments.out, "asked"))

    began = time.perf_counter()
    trees = fit_trees(columns, names, rejected, users, run.config.seed)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    tell(arguments.out, "LightGBM", asked, trees.scores(shown))
    speed = len(shown) / (time.perf_counter() - began)
    tell(arguments.out, "counted odds", asked, fitting.counted().odds.of(of_pairs))
    told = {"fitted on": len(rejected), "rejected": int(rejected.sum()), "asked": len(shown)}
    trials = [asdict(one) | {"held_out_auc": auc} for one, auc in zip(TRIALS, trees.held_out_auc, strict=True)]
    costs = {"tuning_and_training_seconds": round(seconds, 1), "pairs_per_second": round(speed)}
    storage.write_json(f"{arguments.out}/told/pairs.json", told | {"LightGBM": costs | {"trials": trials}})


def task_pairs(task: Task) -> pa.Table:
    """The asked pairs by name, in the order of the task."""
    anchors = task.anchors
    users, times = anchors.users[task.pair_anchors], anchors.times[task.pair_anchors]
    return named(task.events.users, users, times, task.item_ids, task.pair_items)


def named(user_ids: pa.Array, users: np.ndarray, times: np.ndarray, item_ids: pa.Array, items: np.ndarray) -> pa.Table:
    """Pairs by their names. Shape: (N,) each."""
    return pa.table(
        {
            "user_id": user_ids.take(pa.array(users)),
            "anchor_time": pa.array(times, pa.timestamp("us", "UTC")),
            "item_id": item_ids.take(pa.array(items)),
        }
    )


def with_columns(pairs: pa.Table, columns: np.ndarray, names: tuple[str, ...]) -> pa.Table:
    """Shape: columns (N, C) float32."""
    for place, name in enumerate(names):
        pairs = pairs.append_column(name, pa.array(columns[:, place]))
    return pairs


def tell(out: str, name: str, asked: pa.Table, scores: np.ndarray) -> None:
    """Writes a system's scores of the asked pairs, as `conrec evaluate --predictions` reads them."""
    table = asked.append_column("score", pa.array(np.asarray(scores, np.float64)))
    storage.write_table(table, f"{out}/told/{name}.parquet")


def path(out: str, name: str) -> str:
    """A file below the folder."""
    return f"{out}/{name}.parquet"


if __name__ == "__main__":
    main()
