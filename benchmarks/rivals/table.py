"""The table of the rivals: what everybody told of the pairs and ranked for the anchors, measured side by side.

    .venv/bin/python benchmarks/rivals/table.py --config examples/kuairand/conrec.toml --out runs/anchors \\
        --json benchmarks/rivals/kuairand.json --set root=runs/kuairand

Reads `told/*.parquet` and `ranked/*.parquet` of the folder as `conrec evaluate --predictions` would, with the floors
beside them, and writes the JSON: figures with 95 % intervals by user, how far each row of pairs lies above LightGBM on
the same resamples, and the trials and costs of each row. Prints Markdown. `--set` gives the settings that the anchors
were written with.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from conrec.config import load_settings
from conrec.evaluation.headline import TREES
from conrec.evaluation.measured import measure, outside, system_of
from conrec.evaluation.published import auc, catch_at, paired, shown_pairs, within_user_auc
from conrec.evaluation.systems import NAMES
from conrec.evaluation.world import World
from conrec.report.table import number
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world, systems

RANKED = ("FHR", "FPH", "Lift", "catch at 1 %")


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description="the rivals side by side")
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="section.setting=value")
    arguments = parser.parse_args()
    out: Path = arguments.out
    config = load_settings(arguments.config, [*arguments.settings, "evaluation.systems=floors"])
    run = Artefacts(config)
    world = load_world(run, encoded=False)
    told = of_pairs(world, sorted((out / "told").glob("*.parquet")))
    ranked = of_lists(run, world, sorted((out / "ranked").glob("*.parquet")))
    document = {
        "seed": config.seed,
        "anchors": int(world.measured.sum()),
        "pairs": len(world.task.pair_items),
        "told": told,
        "ranked": ranked,
        "costs": {path.stem: json.loads(path.read_text()) for path in sorted((out / "told").glob("*.json"))},
    }
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    show("pairs", told)
    show("lists", ranked)


def of_pairs(world: World, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Name -> measures of the scores of pairs, and how far they lie above LightGBM's."""
    told = outside(world, {path.stem: str(path) for path in files}).told
    pairs, seed = shown_pairs(world.events, world.served), world.config.seed
    found = {}
    for name, scores in told.items():
        catch = {f"catch at {share:.0%}": one for share, one in catch_at(scores, pairs, seed=seed).items()}
        found[name] = {
            "AUC": auc(scores, pairs, seed=seed),
            "within-user AUC": within_user_auc(scores, pairs, seed=seed),
            **catch,
        }
        if TREES in told:
            against = paired(scores, told[TREES], pairs, seed=seed)
            found[name]["AUC above LightGBM"] = against.auc_difference
    return found


def of_lists(run: Artefacts, world: World, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Name -> measures of the lists of the floors, and of those that were ranked."""
    lists = outside(world, {path.stem: str(path) for path in files}).lists
    (floors,) = systems(run)
    rows = {**floors.rows(world), **lists}
    found = {}
    for name, row in rows.items():
        figures = system_of(world, measure(world, NAMES.get(name, name), "outside", row), None).figures
        found[name] = {measured: figures[measured] for measured in RANKED}
    return found


def show(head: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints Markdown."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"\n| {head} | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(cell(row.get(column)) for column in columns)} |")


def cell(figure: dict[str, float] | None) -> str:
    """`.721 [.708, .733]`."""
    if figure is None or np.isnan(figure["value"]):
        return "–"
    return f"{number(figure['value'])} [{number(figure['low'])}, {number(figure['high'])}]"


if __name__ == "__main__":
    main()
