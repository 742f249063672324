"""The example of `make nightly`, reduced: the real command as a process, a second run, the night as a job on a head.

Its settings with smaller numbers, and of its log the users whose number is a multiple of ten.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from conrec import storage
from conrec.serving.reader import BlocklistReader

pytestmark = pytest.mark.ray

HOME = Path(__file__).parents[1]
SETTINGS = "examples/kuairand/quick.toml"
REDUCED = [
    "quantizer.codes=32",
    "supervised.translation_epochs=0.01",
    "supervised.alignment_epochs=0.1",
    "supervised.warmup_epochs=0.1",
    "model.hidden_size=64",
    "model.heads=2",
    "model.intermediate_size=64",
    "model.layers=2",
    'grpo.stages=[{name="recent",blocks=["recent"],steps=2,beta=0.2},'
    '{name="all",blocks=["negatives","positives"],steps=2,beta=0.2}]',
    "generate.beam_width=24",
    "generate.batch_size=16",
    "grpo.group_size=16",
    "grpo.prompts_per_step=8",
    "evaluation.max_anchors=200",
    "evaluation.resamples=50",
    "calibration.alpha=0.2",
]


def command(root: Path, *start: str, users: int = 40) -> list[str]:
    log = root.parent / "interactions.parquet"
    overrides = [f"root={root}", f"interactions.path={log}", f"generate.max_users={users}", *REDUCED]
    return [*start, "--config", SETTINGS, *(part for override in overrides for part in ("--set", override))]


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        arguments, cwd=HOME, env=os.environ | environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("example") / "run"
    interactions = pq.read_table(HOME / "examples/kuairand/interactions.parquet")
    number = pc.cast(interactions["user_id"], "int64")
    few = pc.equal(number, pc.multiply(pc.divide(number, 10), 10))
    pq.write_table(interactions.filter(few), root.parent / "interactions.parquet")
    return root, run(command(root, sys.executable, "-m", "conrec.cli", "run"))


def published_rows(root: Path) -> list[dict]:
    version = BlocklistReader(str(root / "blocklists")).version
    table = storage.read_table(str(root / "blocklists" / "versions" / version / "data"))
    return table.sort_by([("user_id", "ascending"), ("item_id", "ascending")]).to_pylist()


def test_the_run_ends_with_figures_users_places_and_the_cluster_command(finished):
    root, said = finished
    for wanted in ("after GRPO", "exposure x rejection rate", "report.html", "users/s", "ray job submit", "rejected"):
        assert wanted in said, said
    (report,) = root.glob("evaluation/*/report.html")
    assert report.stat().st_size > 10_000
    (checkpoint,) = root.glob("policy/*/checkpoint")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in checkpoint.iterdir()}
    assert not [path for path in root.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pickle")]


def test_what_libraries_print_is_in_the_log_and_not_on_the_terminal(finished):
    root, said = finished
    assert not re.search(r"WARNING|INFO|FutureWarning|Traceback", said), said
    assert (root / "logs" / "train.log").stat().st_size > 0


def test_a_second_run_finds_every_stage_complete(finished):
    root, _ = finished
    before = published_rows(root)
    began = time.monotonic()
    said = run(command(root, sys.executable, "-m", "conrec.cli", "run"))
    assert said.count("is complete") == 4
    assert time.monotonic() - began < 120
    assert published_rows(root) == before


def test_the_blocklists_serve(finished):
    root, _ = finished
    rows = published_rows(root)
    assert {row["reason"] for row in rows} == {"explicit", "predicted"}
    reader = BlocklistReader(str(root / "blocklists"), clock=lambda: rows[0]["expires_at"].replace(year=2000))
    blocked = next(row for row in rows if row["reason"] == "predicted")
    user, item = blocked["user_id"], blocked["item_id"]
    assert reader.filter(user, [item, "none such"]) == ["none such"]
    assert reader.explain(user, item).semantic_id == blocked["semantic_id"]
    assert reader.filter("nobody", [item]) == [item]


def test_the_night_as_a_job_on_a_ray_head_publishes_the_same_rows(finished, ray_head, tmp_path):
    root, _ = finished
    copy = tmp_path / "run"
    shutil.copy(root.parent / "interactions.parquet", tmp_path)
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("nightly", "blocklists", "logs"))
    job = command(copy, sys.executable, "jobs/nightly.py")
    run(job, **ray_head.environment)
    assert published_rows(copy) == published_rows(root)
