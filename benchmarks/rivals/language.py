"""Does language help? The method on SmolLM2-135M beside the small model from scratch, on MovieLens.

    .venv/bin/python examples/kuairand/smollm2.py
    for settings in conrec smollm2; do
        .venv/bin/conrec catalogue --config examples/movielens/$settings.toml
        .venv/bin/conrec train --config examples/movielens/$settings.toml
    done
    .venv/bin/python benchmarks/rivals/language.py

Both policies, before and after GRPO, on the anchors of the evaluation: rejections and likes among 20 items, the
rejection picked among its day's films, and the verdict on all pairs of the windows, alone and added to what is
counted; users with short histories apart, where a model that has read of films should know more. Learning curves are
those of the second training, which sees all events until the cut. `--of "NAME=FILE section.key=value ..."` names
other settings, words `section.key=value` change them all. Writes benchmarks/rivals/language.json, and language.png
beside it; asks a GPU where there is one. The small model takes minutes on two cores, SmolLM2 an hour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from windows import COLUMNS, LINE, Counted, Windows, table

from conrec import storage
from conrec.blocklist.engines import TorchEngine
from conrec.config import load_settings
from conrec.evaluation.headline import TREES
from conrec.evaluation.measured import measure
from conrec.evaluation.metrics import paired_difference, summarise
from conrec.evaluation.policies import blocks_of_prompts
from conrec.evaluation.published import Pairs
from conrec.evaluation.systems import AFTER, BEFORE
from conrec.evaluation.world import World
from conrec.feedback.anchors import Anchors
from conrec.feedback.events import Events
from conrec.policy.prompts import build_prompts
from conrec.ragged import Ragged, places
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world, systems
from conrec.stages.train import read_rows

HOME = Path(__file__).parents[2]
MODELS = {
    "small model from scratch": "examples/movielens/conrec.toml",
    "SmolLM2-135M": "examples/movielens/smollm2.toml",
}
FOLDERS = {BEFORE: "supervised", AFTER: "checkpoint"}
LISTED = ("FHR", "FPH", "likelihood", "choice")
ASKED = 20
"""Pairs of one prompt."""
SMOOTHED = 20
"""Steps of a learning curve that one point is the mean of."""


def main() -> None:
    """Measures both models, prints the tables, and writes JSON and picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--of", action="append", metavar="NAME=FILE", help="a model, its settings, and words that change them"
    )
    parser.add_argument("--out", type=Path, default=HOME / "benchmarks" / "rivals", help="folder of JSON and picture")
    parser.add_argument("settings", nargs="*", help="section.key=value, for all")
    given = parser.parse_args()
    models = dict(one.split("=", 1) for one in given.of) if given.of else MODELS
    rows: dict[str, dict[str, Any]] = {}
    curves, costs, told, added, facts = {}, {}, {}, {}, {}
    for name, file in models.items():
        path, *own = file.split()
        config = load_settings(path, [*given.settings, *own, "evaluation.systems=ours"])
        run = Artefacts(config)
        windows = Windows.of(load_world(run))
        if not rows:
            facts, counted = windows.facts(), Counted.of(windows)
            line = counted.line()
            learnt = {TREES: counted.trees(), LINE: line}
            rows = windows.floors() | {label: windows.figures(None, scores) for label, scores in learnt.items()}
        for id, label in ((BEFORE, "before GRPO"), (AFTER, "after GRPO")):
            figures, said = measured(run, windows, id)
            rows[f"{name}, {label}"], told[name, id] = figures, said
        world = windows.world
        before = verdicts_of(run, world, counted.events, counted.anchors, counted.pairs, FOLDERS[AFTER])
        with_verdict = counted.line((before, told[name, AFTER][1]))
        rows[f"{LINE}, and {name}'s verdict"] = windows.figures(None, with_verdict)
        added[name] = windows.above(with_verdict, line)
        figures = run["policy"].require()["figures"]
        costs[name] = {key: figures[key] for key in ("parameters", "training_seconds")}
        curves[name] = curves_of(read_rows(run["policy"]))
    document = {"about": facts, "systems": rows, "added to the counts": added, "training": costs, "curves": curves}
    if len(models) == 2:
        document["differences"] = differences(windows, told, list(models))
    print(table(rows, {"FHR": "FHR", "FPH": "FPH", "choice": "choice", **COLUMNS}))
    (given.out / "language.json").write_text(json.dumps(document, indent=2) + "\n")
    draw(curves, given.out / "language.png")


Said = tuple[dict[str, np.ndarray], np.ndarray]


def measured(run: Artefacts, windows: Windows, id: str) -> tuple[dict[str, Any], Said]:
    """Figures of the policy before or after GRPO, and what they are the means of: by anchor, and scores of pairs."""
    world = windows.world
    (spec,) = (spec for spec in systems(run) if spec.id == id)
    row = measure(world, spec.name, spec.group, spec.rows(world)[id])
    settings = world.config.evaluation
    values = {name: row.values[name][windows.places] for name in LISTED if name in row.values}
    values |= {f"{name}_short": np.where(windows.short, column, np.nan) for name, column in values.items()}
    verdicts = verdicts_of(run, world, world.events, windows.anchors, windows.pairs, FOLDERS[id])
    figures = summarise(values, windows.anchors.users, settings.resamples, world.config.seed)
    assert row.row.answer is not None
    return figures | windows.figures(row.predictions.candidates, verdicts), (values, verdicts)


def verdicts_of(
    run: Artefacts, world: World, events: Events, anchors: Anchors, pairs: Pairs, folder: str
) -> np.ndarray:
    """log P(rejected) - log P(liked) of every pair; anchors are places in these events. Shape: (N,) float64."""
    config = run.config
    with storage.local_folder(run["policy"].path(folder)) as local:
        engine = TorchEngine.load(local, world.catalogue.trie)
    nth = places(np.bincount(pairs.users, minlength=len(anchors)))
    first = np.flatnonzero(nth % ASKED == 0)
    lengths = np.diff(np.append(first, len(pairs)))
    leaves = Ragged.from_lengths(world.catalogue.trie.item_leaves[pairs.items].astype(np.int64), lengths).padded(-1)
    semantic_ids, blocks = world.catalogue.semantic_ids, blocks_of_prompts(config)
    prompts = build_prompts(events, anchors, semantic_ids, engine.vocabulary, config.prompt, blocks)
    _, verdicts = engine.score_and_judge(prompts.take(pairs.users[first]), leaves)
    return verdicts[leaves >= 0].astype(np.float64)


def differences(windows: Windows, told: dict[tuple[str, str], Said], names: list[str]) -> dict[str, Any]:
    """The second model less the first, paired, after GRPO."""
    world, (first, second) = windows.world, names
    settings, seed = world.config.evaluation, world.config.seed
    (before, theirs), (after, ours) = told[first, AFTER], told[second, AFTER]
    same = before.keys() & after.keys()
    one, other = ({name: values[name] for name in LISTED if name in same} for values in (after, before))
    found: dict[str, Any] = {"all": paired_difference(one, other, windows.anchors.users, settings.resamples, seed)}
    short = {name: values[windows.short] for name, values in one.items()}
    others = {name: values[windows.short] for name, values in other.items()}
    users = windows.anchors.users[windows.short]
    found["short histories"] = paired_difference(short, others, users, settings.resamples, seed)
    for name, figures in windows.above(ours, theirs).items():
        found[name] |= figures
    return found


def curves_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Phase -> steps, and the means of loss (GRPO: reward) over SMOOTHED steps; and what was read at its end."""
    found: dict[str, Any] = {}
    for phase in dict.fromkeys(row["phase"] for row in rows):
        steps = [row for row in rows if row["phase"] == phase and "loss" in row]
        name = "reward" if steps and "reward" in steps[0] else "loss"
        blocks = [steps[first : first + SMOOTHED] for first in range(0, len(steps), SMOOTHED)]
        found[phase] = {
            "steps": [block[-1]["step"] for block in blocks],
            name: [round(float(np.mean([row[name] for row in block])), 4) for block in blocks],
        }
        for row in rows:
            if row["phase"] == phase:
                found[phase] |= {key: row[key] for key in ("alignment_accuracy", "verdict_auc") if key in row}
    return found


def draw(curves: dict[str, Any], path: Path) -> None:
    """A panel for each phase, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    phases = list(dict.fromkeys(phase for course in curves.values() for phase in course))
    figure, panels = pyplot.subplots(1, len(phases), figsize=(3.2 * len(phases), 2.6), squeeze=False)
    for panel, phase in zip(panels[0], phases, strict=True):
        for name, course in curves.items():
            if phase in course:
                measure_name = "reward" if "reward" in course[phase] else "loss"
                panel.plot(course[phase]["steps"], course[phase][measure_name], marker=".", label=name)
                panel.set_ylabel(measure_name)
        panel.set_title(phase.replace("_", " "))
        panel.set_xlabel("step")
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
