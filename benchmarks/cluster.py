"""What it costs to lose a node: training and night on a Ray cluster of three nodes, one of them killed in each.

    .venv/bin/python benchmarks/cluster.py                  # the example on a fortieth of its users: minutes
    .venv/bin/python benchmarks/cluster.py night            # or training alone

The nodes are Ray's own of one machine: a raylet, an object store and workers each, two logical cores, one of them the
head. Two training workers, and then two engines, take a node each; the third is spare. Each stage is the real command
in a process of its own that joins by RAY_ADDRESS. The node that is killed holds a worker, or an engine, and is not the
head: killed with SIGKILL once the first checkpoint, or the first file of users, is written. Compared with the same
stage on a Ray of one node, and on three nodes of which none is lost; every night takes the policy of the first
training, so that what is published can be compared row by row. Writes benchmarks/cluster.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

HOME = Path(__file__).parents[1]
sys.path.insert(0, str(HOME / "tests"))  # the small example is written down there

from small_example import command, write_tables  # noqa: E402

RESULTS = HOME / "benchmarks" / "cluster.json"
CORES = 2
SETTINGS = [
    "timeline.refit=false",
    "supervised.warmup_epochs=1.0",
    "train.workers=2",
    f"train.cpus_per_worker={CORES}",
    "train.checkpoint_every=2",
    'generate.engine="torch"',
    "generate.engines=2",
    f"generate.cpus_per_engine={CORES}",
    "generate.batch_size=8",
    "generate.max_users=100",
]
LIMIT_SECONDS = 900.0


def main() -> None:
    """Trains and generates three times each, or what the arguments name, and writes the JSON."""
    asked = sys.argv[1:] or ["training", "night"]
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOME)}
    with tempfile.TemporaryDirectory(prefix="conrec-cluster-") as folder:
        home = Path(folder)
        write_tables(home)
        stage("catalogue", home / "first")
        if "training" in asked:
            noted("training", compared("train", home, "RayTrainWorker", "checkpoint_manager_snapshot.json", weights))
        else:
            stage("train", home / "first", RAY_ADDRESS="local")
        if "night" in asked:
            noted("night", compared("nightly", home, "_Generator", "progress/*.parquet", blocklists))
    print(RESULTS.read_text())


def noted(part: str, measured: dict[str, Any]) -> None:
    """Puts one part into the JSON."""
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document |= {"nodes": 3, "logical_cores_a_node": CORES, part: measured}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


def compared(name: str, home: Path, holder: str, sign: str, made: Callable[[Path], Any]) -> dict[str, Any]:
    """Seconds of a stage on one node, on three, and on three of which one is lost; and how far its results agree.

    Every run starts from what `first` is before the stage, and `first` itself goes on with that of one node.
    """
    roots = {kind: home / f"{kind} {name}" for kind in ("whole", "lost")}
    for root in roots.values():
        shutil.copytree(home / "first", root)
    seconds = {"one_node": stage(name, home / "first", RAY_ADDRESS="local")}
    with cluster() as nodes:
        seconds["three_nodes"] = stage(name, roots["whole"], RAY_ADDRESS=nodes.address)
    with cluster() as nodes:
        began, process = time.perf_counter(), start(name, roots["lost"], RAY_ADDRESS=nodes.address)
        wait_for(lambda: any(roots["lost"].rglob(sign)), process)
        killed = kill_one_that_holds(holder, nodes)
        assert process.wait(LIMIT_SECONDS) == 0, f"{name} did not end well after {killed} of its workers were lost"
        seconds["one_lost"] = time.perf_counter() - began
    one, whole, lost = (made(root) for root in (home / "first", *roots.values()))
    return {
        "seconds": {kind: round(value, 1) for kind, value in seconds.items()},
        "loss_costs_seconds": round(seconds["one_lost"] - seconds["three_nodes"], 1),
        "workers_on_the_lost_node": killed,
        "largest_difference": {"three_nodes": difference(one, whole), "one_lost": difference(one, lost)},
    }


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """Three nodes of this machine."""
    from ray.cluster_utils import Cluster

    args = {"num_cpus": CORES, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=args)
    for _ in range(2):
        nodes.add_node(num_cpus=CORES)
    try:
        yield nodes
    finally:
        nodes.shutdown()


def kill_one_that_holds(holder: str, nodes: Any) -> int:
    """Kills a node that is not the head and holds such workers; returns how many."""
    held = {node: workers_of(node, holder) for node in nodes.worker_nodes}
    node = max(held, key=lambda one: held[one])
    assert held[node], f"no node but the head holds a {holder}"
    nodes.remove_node(node, allow_graceful=False)
    return held[node]


def workers_of(node: Any, holder: str) -> int:
    """How many of a node's processes are such workers."""
    raylets = [info.process.pid for info in node.all_processes["raylet"]]
    children = [child for pid in raylets for child in psutil.Process(pid).children(recursive=True)]
    found = 0
    for child in children:
        with contextlib.suppress(psutil.Error):
            found += holder in " ".join(child.cmdline())
    return found


def start(name: str, root: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A stage as a process."""
    more = [part for setting in SETTINGS for part in ("--set", setting)]
    # The tables lie beside the first root for all of them.
    arguments = [*command(root.parent / "first", sys.executable, "-m", "conrec.cli", name), *more]
    return subprocess.Popen([*arguments, "--set", f"root={root}"], cwd=HOME, env=os.environ | environment)


def stage(name: str, root: Path, **environment: str) -> float:
    """Runs a stage to its end; returns its seconds."""
    began = time.perf_counter()
    assert start(name, root, **environment).wait(LIMIT_SECONDS) == 0, name
    return time.perf_counter() - began


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Raises where the process ends first."""
    until = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert process.poll() is None and time.monotonic() < until, "it ended before a node could be killed"
        time.sleep(0.02)


def weights(root: Path) -> dict[str, np.ndarray]:
    """Tensors of the policy that is served."""
    from safetensors.numpy import load_file

    (file,) = root.glob("policy/*/checkpoint/*.safetensors")
    return load_file(file)


def blocklists(root: Path) -> dict[str, np.ndarray]:
    """Columns of what is published, as numbers; raises where rows are not those of each other."""
    (folder,) = root.glob("blocklists/versions/*/data")
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    rows = [f"{user} {item} {reason}" for user, item, reason in zip(*map(table.column, range(3)), strict=True)]
    return {" ".join(rows): table["score"].to_numpy()}


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Of all numbers; infinity where they are of other things."""
    if one.keys() != other.keys():
        return float("inf")
    return float(max(np.abs(one[name].astype(np.float64) - other[name]).max(initial=0) for name in one))


if __name__ == "__main__":
    main()
