"""The example of `make nightly`, reduced: the real command, a second run, and the night as a job on a Ray head.

Its settings with smaller numbers, and a fortieth of its users (tests/small_example.py).
"""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from small_example import HOME, SETTINGS, command, overrides, run

from conrec import storage
from conrec.catalogue.codebook import format_semantic_ids
from conrec.serving.reader import BlocklistReader

pytestmark = pytest.mark.ray


def published_rows(root: Path) -> list[dict]:
    version = BlocklistReader(str(root / "blocklists")).version
    table = storage.read_table(str(root / "blocklists" / "versions" / version / "data"))
    return table.sort_by([("user_id", "ascending"), ("item_id", "ascending")]).to_pylist()


def test_the_run_ends_with_figures_users_places_and_the_cluster_command(finished_run):
    root, said = finished_run
    for wanted in ("after GRPO", "exposure x rejection rate", "report.html", "users/s", "ray job submit", "rejected"):
        assert wanted in said, said
    (report,) = root.glob("evaluation/*/report.html")
    assert report.stat().st_size > 10_000
    (checkpoint,) = root.glob("policy/*/checkpoint")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in checkpoint.iterdir()}
    assert not [path for path in root.rglob("*") if path.suffix in (".pkl", ".pt", ".bin", ".pickle")]


def test_what_libraries_print_is_in_the_log_and_not_on_the_terminal(finished_run):
    root, said = finished_run
    assert not re.search(r"WARNING|INFO|FutureWarning|Traceback", said), said
    assert (root / "logs" / "train.log").stat().st_size > 0


def test_a_second_run_finds_every_stage_complete(finished_run):
    root, _ = finished_run
    before = published_rows(root)
    began = time.monotonic()
    said = run(command(root, sys.executable, "-m", "conrec.cli", "run"))
    assert said.count("is complete") == 4
    assert time.monotonic() - began < 120
    assert published_rows(root) == before


def test_the_blocklists_serve(finished_run):
    root, _ = finished_run
    rows = published_rows(root)
    assert {row["reason"] for row in rows} == {"explicit", "predicted"}
    reader = BlocklistReader(str(root / "blocklists"), clock=lambda: rows[0]["expires_at"].replace(year=2000))
    blocked = next(row for row in rows if row["reason"] == "predicted")
    user, item = blocked["user_id"], blocked["item_id"]
    assert reader.filter(user, [item, "none such"]) == ["none such"]
    assert reader.explain(user, item).semantic_id == blocked["semantic_id"]
    assert reader.filter("nobody", [item]) == [item]


def test_the_night_as_a_job_on_a_ray_head_publishes_the_same_rows(finished_run, ray_head, tmp_path):
    root, _ = finished_run
    copy = tmp_path / "run"
    for name in ("interactions", "items"):
        shutil.copy(root.parent / f"{name}.parquet", tmp_path)
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("nightly", "blocklists", "logs"))
    job = command(copy, sys.executable, "jobs/nightly.py")
    run(job, **ray_head.environment)
    assert published_rows(copy) == published_rows(root)


def test_the_tour_runs_and_draws(finished_run, monkeypatch):
    root, _ = finished_run
    book = json.loads((HOME / "examples" / "tour.ipynb").read_text())
    (first, *others) = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    settings = f"SETTINGS, OVERRIDES = {SETTINGS!r}, {overrides(root)}"
    first, replaced = re.subn(r"^SETTINGS, OVERRIDES = .*$", lambda _: settings, first, flags=re.M)
    assert replaced == 1
    pictures, told = [], {}
    monkeypatch.setattr(plt, "show", lambda: pictures.append(plt.gcf()))
    monkeypatch.chdir(HOME / "examples")
    for code in (first, *others):
        exec(compile(code, "tour.ipynb", "exec"), told)
    plt.close("all")
    assert len(pictures) == 5 and all(picture.axes[0].has_data() for picture in pictures)
    because, reader = told["because"], told["reader"]
    assert because in told["rows"] and because.item_id not in reader.filter(told["user"], told["candidates"])
    assert set(told["written"]) <= set(format_semantic_ids(told["semantic_ids"]).to_pylist())
    assert (told["factors"][0] == 0).all() and (told["factors"][-1] == 1).all()


def test_the_tour_is_committed_without_what_it_printed():
    book = json.loads((HOME / "examples" / "tour.ipynb").read_text())
    assert not [cell for cell in book["cells"] if cell.get("outputs")]
