"""An evaluation of several kinds of systems for real, on few users: what a table of hours does, in a minute.

Every kind of row is there once: floors, a sequential model, TIGER, a policy with another warm-up, ours. The other rows
of `--systems all` differ in settings alone (tests/evaluation/test_systems.py).
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from small_example import overrides, run

from conrec import storage
from conrec.config import load_settings
from conrec.evaluation.headline import EVERYBODY, ODDS, OURS, PARTS, TREES, WITHOUT
from conrec.evaluation.sequential import KINDS
from conrec.evaluation.systems import AFTER, BEFORE, COUNTED, FULL, NAMES
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import systems

pytestmark = pytest.mark.ray

OTHERS = [KINDS[0], "tiger", "next_negative"]
ROWS = [*OTHERS, BEFORE, AFTER]
SETTINGS = "examples/kuairand/conrec.toml"
OVERRIDES = ["generate.engine=torch", "evaluation.systems=all"]


def names(*ids: str) -> set[str]:
    return {NAMES.get(id, id) for id in ids}


PROGRAM = """
import json, sys
import conrec.stages.evaluate as stage
import conrec.stages.systems as rows
from conrec.config import load_settings
from conrec.stages.run import run_stage

rows.TRIALS, rows.TIGER_TRIALS = rows.TRIALS[:1], rows.TIGER_TRIALS[:1]
config = load_settings(sys.argv[1], sys.argv[3:])
wanted = ["floors", *json.loads(sys.argv[2])]
stage.systems = lambda config: [spec for spec in rows.systems(config) if spec.id in wanted]
for name in ("catalogue", "train", "evaluate"):
    run_stage(name, config)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, finished_run, ray_head) -> Path:
    """Folder of a finished evaluation in a copy of another run's root, which has what both read of the items.

    `make nightly` serves what it trained until the validation time; here, as by default, a policy is trained until the
    cut.
    """
    folder = tmp_path_factory.mktemp("systems")
    made, _ = finished_run
    for name in ("interactions", "items"):
        shutil.copy(made.parent / f"{name}.parquet", folder)
    shutil.copytree(
        made, folder / "run", ignore=shutil.ignore_patterns("evaluation", "systems", "nightly", "blocklists")
    )
    evaluate(folder, ray_head.environment)
    return folder


def evaluate(folder: Path, environment: dict[str, str]) -> None:
    settings = [*overrides(folder / "run"), *OVERRIDES]
    run([sys.executable, "-c", PROGRAM, SETTINGS, json.dumps(ROWS), *settings], OMP_NUM_THREADS="1", **environment)


def test_the_table_holds_every_system_with_its_costs(root):
    (path,) = root.glob("run/evaluation/*/metrics.json")
    document = json.loads(path.read_text())
    assert {*names(*ROWS, FULL, COUNTED), "random", "exposure x rejection rate^3"} <= document["systems"].keys()
    for name, system in document["systems"].items():
        assert {"FHR", "FPH", "Lift", "catch at 1 %", "likelihood", "served"} <= system["figures"].keys(), name
        assert system["users_per_second"] > 0, name
        learned = system["group"] != "floor" and name != NAMES[COUNTED]
        assert not learned or (system["parameters"] > 0 and system["training_seconds"] > 0), name
    compared = document["comparisons"].keys()
    added = {f"{name}, our odds added" for name in names("tiger", BEFORE)}
    assert {"most shown", *names(*OTHERS, COUNTED), *added} <= compared
    assert not compared & names(BEFORE, AFTER, FULL)
    assert {"rejected", "liked"} <= document["responsiveness"].keys()
    lists = document["published"]["systems"]
    assert lists.keys() == {OURS, *PARTS, WITHOUT, TREES, ODDS, EVERYBODY}
    for name, system in lists.items():
        assert {"0.01", "0.05", "0.1", "0.3"} <= system["at_alpha"].keys(), name
    assert document["calibration"]["alpha"] == 0.3 and document["calibration"]["overall"]["threshold"] is not None
    assert "warm_up" in document["forgetting"][NAMES[BEFORE]]


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


def test_a_policy_that_no_stage_changed_is_asked_once_for_both_of_its_rows(root):
    made = Artefacts(load_settings(SETTINGS, [*overrides(root / "run"), *OVERRIDES]))
    policy = made["policy"]
    manifest = policy.require()
    supervised = {name: entry for name, entry in manifest["files"].items() if name.startswith("supervised/")}
    for sha256 in (None, "0" * 64):
        ends = {name.replace("supervised/", "checkpoint/"): dict(entry) for name, entry in supervised.items()}
        if sha256 is not None:
            ends["checkpoint/model.safetensors"]["sha256"] = sha256
        storage.write_json(policy.path("artefact.json"), manifest | {"files": supervised | ends})
        specs = {spec.id: spec for spec in systems(made)}
        assert (specs[BEFORE].artefact.version == specs[AFTER].artefact.version) == (sha256 is None)
        assert specs[BEFORE].about()["training_seconds"] < specs[AFTER].about()["training_seconds"]
