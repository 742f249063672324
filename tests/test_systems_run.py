"""An evaluation of several kinds of systems for real, on few users: what a table of hours does, in minutes.

Every kind of row is there once: floors, a sequential model, TIGER, a policy with another warm-up, ours. The other rows
of `--systems all` differ in settings alone (tests/evaluation/test_systems.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conrec.evaluation.sequential import KINDS
from conrec.stages.published import COUNTED as COUNTED_LISTS
from conrec.stages.published import EVERYBODY, ODDS, OURS, PARTS, TREES
from conrec.stages.systems import AFTER, BEFORE, COUNTED, FULL

pytestmark = pytest.mark.ray

HOME = Path(__file__).parents[1]
OTHERS = [KINDS[0], "TIGER", "next-negative warm-up only"]
ROWS = [*OTHERS, BEFORE, AFTER]
REDUCED = [
    "quantizer.codes=16",
    "embedding.behaviour_dim=16",
    "supervised.translation_epochs=0.01",
    "supervised.alignment_epochs=0.1",
    "supervised.warmup_epochs=0.2",
    "model.hidden_size=32",
    "model.heads=1",
    "model.intermediate_size=32",
    "model.layers=1",
    'grpo.stages=[{name="all",blocks=["negatives","positives"],steps=1,beta=0.2}]',
    "grpo.group_size=8",
    "grpo.prompts_per_step=8",
    "generate.beam_width=24",
    "generate.engine=torch",
    "train.cpus_per_worker=1",
    "evaluation.systems=all",
    "evaluation.resamples=20",
    "evaluation.responsiveness_anchors=20",
    "calibration.alpha=0.3",
]
PROGRAM = """
import json, sys
import conrec.stages.evaluate as stage
import conrec.stages.systems as rows
from conrec.config import load_settings
from conrec.stages.run import run_stage

rows.TRIALS, rows.TIGER_TRIALS = rows.TRIALS[:1], rows.TIGER_TRIALS[:1]
config = load_settings(sys.argv[1], sys.argv[3:])
wanted = ["floors", *json.loads(sys.argv[2])]
stage.systems = lambda config: [spec for spec in rows.systems(config) if spec.name in wanted]
for name in ("catalogue", "train", "evaluate"):
    run_stage(name, config)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, ray_head) -> Path:
    """Folder of a finished evaluation for the users whose number is a multiple of 40."""
    folder = tmp_path_factory.mktemp("systems")
    interactions = pq.read_table(HOME / "examples/kuairand/interactions.parquet")
    number = pc.cast(interactions["user_id"], "int64")
    few = pc.equal(pc.subtract(number, pc.multiply(pc.divide(number, 40), 40)), 0)
    pq.write_table(interactions.filter(few), folder / "interactions.parquet")
    evaluate(folder, ray_head.environment)
    return folder


def evaluate(folder: Path, environment: dict[str, str]) -> None:
    overrides = [f"root={folder / 'run'}", f"interactions.path={folder / 'interactions.parquet'}", *REDUCED]
    arguments = [sys.executable, "-c", PROGRAM, "examples/kuairand/conrec.toml", json.dumps(ROWS), *overrides]
    done = subprocess.run(
        arguments,
        cwd=HOME,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_holds_every_system_with_its_costs(root):
    (path,) = root.glob("run/evaluation/*/metrics.json")
    document = json.loads(path.read_text())
    assert {*ROWS, FULL, COUNTED, "random", "exposure x rejection rate^3"} <= document["systems"].keys()
    for name, system in document["systems"].items():
        assert {"FHR", "FPH", "Lift", "catch at 1 %", "likelihood", "served"} <= system["figures"].keys(), name
        assert system["users_per_second"] > 0, name
        learned = system["group"] != "floor" and name != COUNTED
        assert not learned or (system["parameters"] > 0 and system["training_seconds"] > 0), name
    compared = document["comparisons"].keys()
    added = {f"{name}, our odds added" for name in ("TIGER", BEFORE)}
    assert {"most shown", *OTHERS, COUNTED, *added} <= compared
    assert not compared & {BEFORE, AFTER, FULL}
    assert {"rejected", "liked"} <= document["responsiveness"].keys()
    lists = document["published"]["systems"]
    assert lists.keys() == {OURS, *PARTS, COUNTED_LISTS, TREES, ODDS, EVERYBODY}
    for name, system in lists.items():
        assert {"0.01", "0.05", "0.1", "0.3"} <= system["at_alpha"].keys(), name
    assert document["calibration"]["alpha"] == 0.3 and document["calibration"]["overall"]["threshold"] is not None
    assert "warm_up" in document["forgetting"][BEFORE]


def test_only_the_row_that_was_lost_is_made_again(root, ray_head):
    manifests = {path: path.stat().st_mtime_ns for path in root.glob("run/systems/*/artefact.json")}
    lost = next(path for path in manifests if f'"system": "{KINDS[0]}"' in path.read_text())
    before = (lost.parent / "predictions.parquet").read_bytes()
    lost.unlink()
    (finished,) = root.glob("run/evaluation/*/artefact.json")
    finished.unlink()
    evaluate(root, ray_head.environment)
    assert (lost.parent / "predictions.parquet").read_bytes() == before
    assert {path for path, time in manifests.items() if path.stat().st_mtime_ns != time} == {lost}
