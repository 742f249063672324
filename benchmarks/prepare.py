"""How long 10 million interactions take from Arrow tables to anchors, targets and Swing neighbours.

The rows of the example are repeated with other user ids until there are enough. Copies of a user reject the same
items, so Swing meets far more common users per pair of items than in real data of this size: a hard case for it.

    python benchmarks/prepare.py            # 10 million rows; prints and writes benchmarks/prepare.json
    python benchmarks/prepare.py 1000000
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.config import InteractionSettings, ItemSettings, SwingSettings, TimelineSettings
from conrec.feedback.anchors import evaluation_anchors, training_anchors
from conrec.feedback.events import encode_events
from conrec.feedback.labels import read_interactions, read_items
from conrec.feedback.swing import swing_neighbours
from conrec.feedback.targets import ground_truth_sets, targets

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "kuairand"


def repeated(interactions: pa.Table, rows: int) -> pa.Table:
    """The table's rows over and over, each time with other user ids, `rows` in all."""
    copies = -(-rows // len(interactions))
    tables = [
        interactions.set_column(
            interactions.column_names.index("user_id"),
            "user_id",
            pc.binary_join_element_wise(interactions["user_id"], str(copy), "-"),
        )
        for copy in range(copies)
    ]
    return pa.concat_tables(tables).slice(0, rows)


def main(rows: int) -> None:
    """Times each step once and writes the figures beside this file."""
    timeline = TimelineSettings.model_validate({"cut": "2022-05-01T16:00:00Z"})
    columns = ["user_id", "item_id", "timestamp", "feedback"]
    interactions = read_interactions(InteractionSettings(path=str(EXAMPLE / "interactions.parquet"))).select(columns)
    items = read_items(ItemSettings(path=str(EXAMPLE / "items.parquet")))
    table = repeated(interactions, rows)
    # Input as it comes from many files: in no order of users.
    table = table.take(pa.array(np.random.default_rng(0).permutation(len(table)))).combine_chunks()
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds: dict[str, float] = {}
    start = last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name], last = round(now - last, 2), now
        print(f"{name:20} {seconds[name]:8.2f} s", flush=True)

    events, _ = encode_events(table, items["item_id"], 0.01)
    lap("encode_events")
    training = events.before(timeline.validation_us)
    anchors = training_anchors(training, timeline)
    lap("training_anchors")
    evaluation = evaluation_anchors(events, timeline)
    lap("evaluation_anchors")
    wanted = targets(training, anchors)
    targets(events, evaluation)
    lap("targets")
    neighbours = swing_neighbours(training, len(items), SwingSettings(), seed=0)
    lap("swing_neighbours")
    ground_truth_sets(wanted, neighbours, kappa=0.3)
    lap("ground_truth_sets")
    figures = {
        "rows": len(table),
        "users": len(events.users),
        "training_anchors": len(anchors),
        "evaluation_anchors": len(evaluation),
        "swing_edges": len(neighbours.items.values),
        "swing_covered_share": round(neighbours.covered_share, 4),
        "cores": len(os.sched_getaffinity(0)),
        "seconds": seconds,
        "total_seconds": round(last - start, 2),
        "input_gib": round(before_bytes / 2**30, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(figures, indent=2))
    (HERE / "prepare.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
