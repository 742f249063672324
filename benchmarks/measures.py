"""How long the measures of an evaluation take for 100 thousand anchors, with intervals of 1,000 resamples.

Lists and targets are drawn at random: the time depends on their number alone. Everything runs in one process.

    python benchmarks/measures.py            # 100,000 anchors; prints and writes benchmarks/measures.json
    python benchmarks/measures.py 10000
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conrec.config import EvaluationSettings
from conrec.evaluation.frontier import catch_at_false_block, frontier_difference
from conrec.evaluation.metrics import paired_difference, per_anchor, summarise
from conrec.feedback.targets import Targets
from conrec.ragged import Ragged

ITEMS, K, LIST, RESAMPLES, SEED = 100_000, 20, 100, 1000, 0


def main(anchors: int) -> None:
    """Times each measure once and writes the figures beside this file."""
    random = np.random.default_rng(SEED)
    wanted = Targets(random.integers(0, ITEMS, anchors).astype(np.int32), sets(random, anchors), sets(random, anchors))
    # A stride coprime to the number of items: no list holds an item twice.
    starts = random.integers(0, ITEMS, anchors)[:, None]
    lists = ((starts + np.arange(LIST) * 7_919) % ITEMS).astype(np.int32)
    scores = -np.sort(random.random((anchors, LIST)).astype(np.float32), axis=1)
    users, rejections = np.arange(anchors), random.integers(0, 10, anchors)
    per_item = random.integers(0, 50, ITEMS)
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - began, 2)
        print(f"{name:40}{seconds[name]:8.2f} s", flush=True)
        return result

    settings = EvaluationSettings(resamples=RESAMPLES)
    values = timed(
        "per_anchor, 20 predictions", lambda: per_anchor(lists[:, :K], wanted, rejections, per_item, settings)
    )
    other = per_anchor(lists[:, K : 2 * K], wanted, rejections, per_item, settings)
    timed("summarise", lambda: summarise(values, users, RESAMPLES, SEED))
    timed("paired_difference", lambda: paired_difference(values, other, users, RESAMPLES, SEED))
    halves = users % 2 == 0
    timed(
        "frontier_difference, 2 points",
        lambda: frontier_difference([values, other], [other], other, users, halves, RESAMPLES, SEED),
    )
    timed(
        "catch_at_false_block, 100 predictions",
        lambda: catch_at_false_block(lists, scores, wanted, users, RESAMPLES, SEED),
    )
    figures = {
        "anchors": anchors,
        "resamples": RESAMPLES,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    (Path(__file__).parent / "measures.json").write_text(json.dumps(figures, indent=2) + "\n")


def sets(random: np.random.Generator, anchors: int) -> Ragged:
    """Three items for each anchor on average."""
    lengths = random.integers(1, 6, anchors)
    items = random.integers(0, ITEMS, int(lengths.sum()))
    pairs = np.unique(np.repeat(np.arange(anchors), lengths) << 32 | items)
    return Ragged.from_rows(pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32), anchors)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
