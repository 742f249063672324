"""`conrec evaluate --systems all` for real, on few users: a whole table, and only what was lost is made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conrec.evaluation.sequential import KINDS
from conrec.stages.systems import ABLATION, AFTER, BEFORE, FULL

HOME = Path(__file__).parents[1]
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
    "generate.prior_ids=8",
    "generate.engine=torch",
    "train.cpus_per_worker=1",
    "evaluation.resamples=20",
    "evaluation.responsiveness_anchors=20",
    "calibration.alpha=0.3",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folder of a finished evaluation of all systems for the users whose number is a multiple of 40."""
    folder = tmp_path_factory.mktemp("systems")
    interactions = pq.read_table(HOME / "examples/kuairand/interactions.parquet")
    number = pc.cast(interactions["user_id"], "int64")
    few = pc.equal(pc.subtract(number, pc.multiply(pc.divide(number, 40), 40)), 0)
    pq.write_table(interactions.filter(few), folder / "interactions.parquet")
    for stage in ("catalogue", "train"):
        conrec(folder, stage)
    conrec(folder, "evaluate", "--systems", "all")
    return folder


def conrec(folder: Path, *command: str) -> str:
    overrides = [f"root={folder / 'run'}", f"interactions.path={folder / 'interactions.parquet'}", *REDUCED]
    settings = ["--config", "examples/kuairand/conrec.toml"]
    settings += [part for override in overrides for part in ("--set", override)]
    arguments = [sys.executable, "-m", "conrec.cli", *command, *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, cwd=HOME, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_table_holds_every_system_with_its_costs(root):
    (path,) = root.glob("run/evaluation/*/metrics.json")
    document = json.loads(path.read_text())
    named = {*KINDS, "TIGER", BEFORE, AFTER, FULL, "random", "exposure x rejection rate^3", "S-DPO instead of GRPO"}
    named |= {"LC-Rec, negatives only", "LC-Rec, negatives and positives", "next-negative warm-up only"}
    assert named | {name for name, _ in ABLATION} <= document["systems"].keys()
    for name, system in document["systems"].items():
        assert {"FHR", "FPH", "Lift", "catch at 1 %", "likelihood", "served"} <= system["figures"].keys(), name
        assert system["users_per_second"] > 0, name
        assert system["group"] == "floor" or (system["parameters"] > 0 and system["training_seconds"] > 0), name
    assert [step["step"] for step in document["ablation"]] == [step for _, step in ABLATION[1:]]
    assert "most shown" in document["comparisons"] and BEFORE not in document["comparisons"]
    assert {"rejected", "liked"} <= document["responsiveness"].keys()
    assert document["theta"]["promise"]["splits"] > 0
    assert "warm_up" in document["forgetting"][BEFORE]


def test_only_the_row_that_was_lost_is_made_again(root):
    manifests = {path: path.stat().st_mtime_ns for path in root.glob("run/systems/*/artefact.json")}
    lost = next(path for path in manifests if '"system": "SASRec on negatives"' in path.read_text())
    before = (lost.parent / "predictions.parquet").read_bytes()
    lost.unlink()
    (finished,) = root.glob("run/evaluation/*/artefact.json")
    finished.unlink()
    conrec(root, "evaluate", "--systems", "all")
    assert (lost.parent / "predictions.parquet").read_bytes() == before
    assert {path for path, time in manifests.items() if path.stat().st_mtime_ns != time} == {lost}
