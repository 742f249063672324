"""The pairs of the weekly windows, for rivals with an environment of their own: where the cut itself asks too few.

    .venv/bin/python benchmarks/rivals/weekly.py write --config examples/movielens/conrec.toml --out runs/weekly
    /tmp/catboost/bin/python benchmarks/rivals/catboost_trees/trees.py --pairs runs/weekly
    /tmp/din/bin/python benchmarks/rivals/din/din.py --pairs runs/weekly
    .venv/bin/python benchmarks/rivals/weekly.py measure --config examples/movielens/conrec.toml --out runs/weekly

`write` leaves what `conrec anchors` and pairs.py leave for the cut: `fit.parquet`, the pairs between the validation
time and the cut with what is counted of them, `asked.parquet`, those after it, `items.parquet` and `events.parquet`,
which reaches to the last of them: of each pair nothing is to be read that lies behind its `anchor_time`. `measure`
reads `told/*.parquet`, puts LightGBM and the line of our score beside them, prints Markdown and writes the JSON. Needs
a finished catalogue.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from pairs import named, with_columns
from windows import COLUMNS, LINE, Counted, Windows, table

from conrec import storage
from conrec.config import load_settings
from conrec.evaluation.headline import TREES
from conrec.evaluation.published import Pairs
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world
from conrec.tables import KINDS

HOME = Path(__file__).parents[2]


def main() -> None:
    """Writes the files, or measures what was told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("write", "measure"))
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", type=Path, default=HOME / "benchmarks" / "rivals" / "movielens_pairs.json")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="section.key=value")
    given = parser.parse_args()
    counted = Counted.of(Windows.of(load_world(Artefacts(load_settings(given.config, given.settings)))))
    if given.what == "write":
        write(counted, given.out)
    else:
        document = measured(counted, given.out)
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def write(counted: Counted, out: Path) -> None:
    """What a rival learns from and answers."""
    world = counted.windows.world
    fit = pairs_of(counted, counted.events, counted.anchors, counted.pairs, counted.fitted)
    fit = fit.append_column("was_rejected", pa.array(counted.pairs.rejected))
    asked = pairs_of(counted, world.events, counted.windows.anchors, counted.windows.pairs, counted.asked)
    events, items = world.events, world.items
    log = named(events.users, events.rows, events.times, items.item_ids, events.items)
    log = log.rename_columns(["user_id", "timestamp", "item_id"])
    log = log.append_column("feedback", pa.array(np.array(KINDS)[events.kinds]))
    things = pa.table({"item_id": items.item_ids})
    if items.categories is not None:
        things = things.append_column("category", pa.array(items.categories.astype(str)))
    for name, rows in {"fit": fit, "asked": asked, "events": log, "items": things}.items():
        storage.write_table(rows, f"{out}/{name}.parquet")


def pairs_of(
    counted: Counted, events: Events, anchors: Anchors, pairs: Pairs, columns: dict[str, np.ndarray]
) -> pa.Table:
    """Pairs by their names, with their columns."""
    users, times = anchors.users[pairs.users], anchors.times[pairs.users]
    found = named(events.users, users, times, counted.windows.world.items.item_ids, pairs.items)
    return with_columns(found, np.stack(list(columns.values()), axis=1), tuple(columns))


def measured(counted: Counted, out: Path) -> dict[str, Any]:
    """Figures of what was told, and of what learns here. Raises SystemExit where other pairs were answered."""
    windows = counted.windows
    told = {TREES: counted.trees(), LINE: counted.line()}
    asked = parquet.read_table(out / "asked.parquet", columns=["user_id", "anchor_time", "item_id"])
    for path in sorted((out / "told").glob("*.parquet")):
        answer = parquet.read_table(path)
        if not answer.select(asked.column_names).equals(asked):
            raise SystemExit(f"{path}: it does not answer the pairs of {out}/asked.parquet in their order")
        told[path.stem] = answer["score"].to_numpy()
    rows = {name: windows.figures(None, scores) for name, scores in told.items()}
    print(table(rows, {name: COLUMNS[name] for name in ("auc", "auc_short", "within_user_auc")}))
    costs = {path.stem: json.loads(path.read_text()) for path in sorted((out / "told").glob("*.json"))}
    fitted = {
        "pairs": len(counted.pairs),
        "anchors": len(counted.anchors),
        "rejected": int(counted.pairs.rejected.sum()),
    }
    above = {name: windows.above(scores, told[TREES]) for name, scores in told.items() if name != TREES}
    return {"about": windows.facts(), "fitted on": fitted, "systems": rows, f"above {TREES}": above, "costs": costs}


if __name__ == "__main__":
    main()
