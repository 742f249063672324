"""Scores of `instruct.py` as predictions for `conrec evaluate`, and a table beside the floors.

    .venv/bin/python benchmarks/rivals/instruct/measure.py runs/instruct
    .venv/bin/conrec evaluate --config examples/movielens/conrec.toml --systems floors \
        --predictions TALLRec=runs/instruct/tallrec_candidates.parquet

The folder holds what `questions.py` wrote and the .npz and .json of each system. Writes the predictions beside them,
and benchmarks/rivals/instruct.json unless --tiny. Takes a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from conrec.config import load_settings
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
from conrec.ragged import pairs
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world
from conrec.tables import PREDICTIONS

HOME = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parents[1]))

from windows import Windows, table  # noqa: E402

SYSTEMS = {"tallrec": "TALLRec", "instructrec": "InstructRec"}


def main() -> None:
    """Measures what lies in the folder that is named."""
    given = [word for word in sys.argv[1:] if word != "--tiny"]
    if not given:
        raise SystemExit("name the folder of questions.npz, keys.npz and the scores, then settings as name=value")
    folder = Path(given[0])
    config = load_settings(HOME / "examples" / "movielens" / "conrec.toml", given[1:])
    world = load_world(Artefacts(config), encoded=False)
    windows = Windows.of(world)
    rows, logs = windows.floors(), {}
    for system, name in SYSTEMS.items():
        if (folder / f"{system}.npz").exists():
            logs[name] = json.loads((folder / f"{system}.json").read_text())
            rows |= measured(folder, system, name, windows)
    print(table(rows))
    if "--tiny" not in sys.argv:
        document = {"about": windows.facts(), "systems": rows, "training": logs}
        (HOME / "benchmarks" / "rivals" / "instruct.json").write_text(json.dumps(document, indent=2) + "\n")


def measured(folder: Path, system: str, name: str, windows: Windows) -> dict[str, Any]:
    """Rows of the model as it came and as it was trained; leaves the latter's predictions."""
    world, task = windows.world, windows.world.task
    with np.load(folder / f"{system}.npz") as scores, np.load(folder / "questions.npz") as asked:
        keys = np.load(folder / "keys.npz")
        said = {split: _flat(scores[split], asked, keys, split) for split in scores.files}
    rows = {
        f"{name}{of}": windows.figures(
            _candidates(world, said[f"{state}candidates"]), _of_pairs(windows, said[f"{state}windows"])
        )
        for state, of in (("untuned/", ", untuned"), ("", ""))
        if f"{state}windows" in said  # answered last
    }
    anchors, items, values = said["candidates"]
    _write(folder / f"{system}_candidates.parquet", world, world.anchors, anchors, items, values)
    anchors, items, values = said["pairs"]
    assert len(values) == len(task.pair_items), "another evaluation's questions: make them again"
    _write(folder / f"{system}_pairs.parquet", world, world.anchors, anchors, items, values)
    return rows


Said = tuple[np.ndarray, np.ndarray, np.ndarray]


def _flat(scores: np.ndarray, asked: Any, keys: Any, split: str) -> Said:
    """Anchors, items and scores (N,) of what was asked."""
    split = split.removeprefix("untuned/")
    items = asked[f"{split}/asked"]
    rows, columns = np.nonzero(items >= 0)
    if scores.shape != items.shape:
        raise SystemExit(
            f"{split}: {len(scores):,} questions answered of {len(items):,}; run instruct.py without --most"
        )
    return keys[f"{split}/anchors"][rows], items[rows, columns], scores[rows, columns]


def _candidates(world: World, said: Said) -> np.ndarray:
    """In the places of the world's candidates. Shape: (A, C)."""
    anchors, items, values = said
    found = np.full(world.candidates.items.shape, np.nan, np.float32)
    width = len(world.items.items)
    order = np.argsort(pairs(anchors, items, width))
    asked = world.task.asked
    sought = pairs(*world.task.questions, width)
    place = np.searchsorted(pairs(anchors, items, width)[order], sought)
    found[asked] = values[order][place]
    return found


def _of_pairs(windows: Windows, said: Said) -> np.ndarray:
    """In the order of the pairs of all windows. Shape: (N,)."""
    anchors, items, values = said
    order = np.lexsort((items, anchors))
    same = np.array_equal(anchors[order], windows.pairs.users) and np.array_equal(items[order], windows.pairs.items)
    assert same, "another evaluation's questions: make them again"
    return np.asarray(values[order], np.float64)


def _write(path: Path, world: World, anchors: Anchors, rows: np.ndarray, items: np.ndarray, values: np.ndarray) -> None:
    columns = [
        world.events.users.take(pa.array(anchors.users[rows])),
        pa.array(anchors.times[rows]),
        world.items.items["item_id"].combine_chunks().take(pa.array(items)),
        pa.array(values.astype(np.float64)),
    ]
    cast = [column.cast(field.type) for column, field in zip(columns, PREDICTIONS, strict=True)]
    parquet.write_table(pa.table(cast, PREDICTIONS), path)


if __name__ == "__main__":
    main()
