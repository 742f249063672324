"""Ray Train for real: one worker and two give the same number of steps; killed in the middle, the run goes on.

All but the job that is killed, with its Ray, train on the Ray of the session, from this process.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray.train import FailureConfig, WorkerGroupError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from worlds import TRIE, fhr_at_1, tiny_config, tiny_data, tiny_model

from conrec.catalogue.codebook import Codebook
from conrec.errors import ConfigError
from conrec.policy.failures import FailurePolicy
from conrec.policy.workers import Inputs, fit

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_driver")]

HERE = Path(__file__).parent
PROGRAM = """
import sys
import ray, test_workers
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
test_workers.train(sys.argv[1], 1)
"""


NODES = """
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from conrec.policy.workers import board_here
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    boards = [board_here() for _ in range(8)]
    ray.get([board.since.remote(0) for board in boards])
    assert {one["Address"]["NodeID"] for one in actors().values()} == {ray.get_runtime_context().get_node_id()}
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def train(folder: str, workers: int, start_url: str = "", learning_rate: float = 1e-2) -> None:
    """Trains the tiny world on the Ray that this process is connected to; leaves rows.json, final.safetensors, and
    seen.jsonl with the rows as they came. `learning_rate`: of the supervised phases."""
    settings = {"workers": workers, "cpus_per_worker": 1, "checkpoint_every": 5, "max_failures": 3}
    # Attention dropout draws per worker; what is compared here is the sum over workers.
    stages = [{"name": "all", "blocks": ["negatives", "positives"], "steps": 25, "beta": 0.02}]
    # Eight steps, then twenty-five: seven checkpoints are left after the one that is waited for.
    few = {"supervised": {"warmup_epochs": 4, "learning_rate": learning_rate}, "grpo": {"stages": stages}}
    config = tiny_config(train=settings, model={"attention_dropout": 0}, **few)
    data = tiny_data(config, tiny_model(config)[2])
    if start_url:
        data = dataclasses.replace(data, tasks={})
    data.save(f"{folder}/data")
    # Relative, as a path of a settings file may be.
    codebook_url = os.path.relpath(f"{folder}/codebook.safetensors")
    Codebook(np.eye(8, dtype=np.float32).reshape(2, 4, 8), np.zeros(8, np.float32), ()).save(codebook_url)
    inputs = Inputs(
        config, ["one red item", "two blue items"], TRIE, codebook_url, f"{folder}/data", start_url or left_by(folder)
    )

    def show(row):
        with open(f"{folder}/seen.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")

    policy = fit(inputs, fhr_at_1, f"{folder}/run", show)
    Path(folder, "rows.json").write_text(json.dumps(policy.rows))
    save_file(policy.final, f"{folder}/final.safetensors")


def left_by(folder: str | Path) -> str:
    """Where the tensors at the end of the supervised phases lie."""
    return f"{folder}/supervised.safetensors"


def trained(folder: Path, workers: int = 1, start_url: str = "") -> list[dict]:
    """Rows of a training in this process."""
    train(str(folder), workers, start_url)
    return json.loads((folder / "rows.json").read_text())


def start(folder: Path) -> subprocess.Popen:
    """A job with a Ray of its own."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def steps(rows: list[dict]) -> list[tuple[str, int]]:
    return [(row["phase"], row["step"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    rows = trained(folder)
    return rows, load_file(folder / "final.safetensors"), left_by(folder)


def noted(folder: Path) -> set[str]:
    """Checkpoints that Ray Train would resume from; their files are there a little earlier."""
    file = folder / "run" / "run" / "checkpoint_manager_snapshot.json"
    return set(re.findall(r"checkpoint_[-\w.]+", file.read_text())) - {file.stem} if file.exists() else set()


def wait_for(happened: Callable[[], object], process: subprocess.Popen, folder: Path) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_workers_take_the_same_steps(undisturbed, tmp_path):
    rows = trained(tmp_path, workers=2)
    assert steps(rows) == steps(undisturbed[0])
    # The supervised gradient is a sum over all workers' examples: the same losses up to the order of addition.
    for one, two in zip(undisturbed[0], rows, strict=True):
        if one["phase"] == "warm_up" and "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    # And a prompt draws the same completions, whoever holds it.
    first = [next(row for row in one if row["phase"] == "all" and "reward" in row) for one in (undisturbed[0], rows)]
    assert first[1]["reward"] == pytest.approx(first[0]["reward"], rel=1e-3)
    assert first[1]["most_frequent_share"] == first[0]["most_frequent_share"]


def test_a_killed_worker_is_replaced_and_a_killed_job_is_resumed_by_the_same_command(undisturbed, tmp_path):
    """One training loses its worker, then itself and its Ray; it goes on on the Ray of the session."""
    process = start(tmp_path)
    wait_for(lambda: noted(tmp_path), process, tmp_path)
    (worker,) = train_workers(process)
    worker.kill()
    wait_for(lambda: train_workers(process) not in ([], [worker]), process, tmp_path)
    before = noted(tmp_path)
    wait_for(lambda: noted(tmp_path) - before, process, tmp_path)
    children = psutil.Process(process.pid).children(recursive=True)
    for victim in [psutil.Process(process.pid), *children]:
        if victim.is_running():
            victim.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "rows.json").exists(), "the job ended before it could be killed"
    seen = rows_seen(tmp_path)
    assert_same_end(trained(tmp_path), undisturbed, tmp_path)
    assert rows_seen(tmp_path) - seen < len(undisturbed[0]), "the second run started from the beginning"


def test_stages_alone_go_the_way_of_those_that_followed_their_supervised_phases(undisturbed, tmp_path):
    rows, final, left = undisturbed
    alone = trained(tmp_path, start_url=left)
    for name in ("step", "loss", "reward", "validation_fhr"):
        assert [row.get(name) for row in alone] == [row.get(name) for row in rows if row["phase"] == "all"], name
    for name, value in load_file(tmp_path / "final.safetensors").items():
        np.testing.assert_array_equal(value, final[name], err_msg=name)


def test_a_run_whose_supervised_tensors_somebody_deleted_begins_anew(undisturbed, tmp_path):
    """Its last checkpoint lies behind the step that writes them."""
    left = Path(undisturbed[2])
    shutil.copytree(left.parent / "run", tmp_path / "run")
    assert_same_end(trained(tmp_path), undisturbed, tmp_path)
    assert rows_seen(tmp_path) == len(undisturbed[0])
    assert Path(left_by(tmp_path)).read_bytes() == left.read_bytes()


def test_a_training_that_diverges_ends_at_once_with_its_setting(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^the training has diverged: in step \d of warm_up .*learning_rate = 1e\+30$"
    ):
        train(str(tmp_path), 1, learning_rate=1e30)
    # Another try would begin with the first step again.
    seen = [json.loads(line)["step"] for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert seen == list(range(1, len(seen) + 1))


def test_rows_on_their_way_wait_on_the_drivers_node():
    """Any other may go in the middle of a training, and would take the bar along."""
    run = subprocess.run(
        [sys.executable, "-c", NODES], env=os.environ | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, timeout=300
    )
    assert run.returncode == 0, run.stderr.decode()[-3000:]


@pytest.mark.parametrize("limit", [3, -1])
def test_what_no_other_try_can_mend_is_tried_once(limit):
    policy = FailurePolicy(FailureConfig(max_failures=limit))
    for failure, decision in ((RuntimeError("a node is gone"), "RETRY"), (ConfigError("lower it"), "RAISE")):
        failures = {0: failure, 1: RuntimeError("its peer is gone")}
        assert policy.make_decision(WorkerGroupError("failed", failures)).value == decision


def rows_seen(folder: Path) -> int:
    """Rows that drivers saw as they came."""
    log = folder / "seen.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def train_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Those of a job with a Ray of its own."""
    return [child for child in psutil.Process(process.pid).children(recursive=True) if is_train_worker(child)]


def is_train_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def assert_same_end(rows: list[dict], undisturbed, folder: Path) -> None:
    assert steps(rows) == steps(undisturbed[0])
    for name, value in load_file(folder / "final.safetensors").items():
        np.testing.assert_allclose(value, undisturbed[1][name], rtol=1e-3, atol=1e-4)
