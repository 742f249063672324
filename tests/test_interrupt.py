"""Ctrl-C and SIGTERM, sent to a real run in a process of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import psutil
import pytest

from conrec.interrupt import GRACE_SECONDS

pytestmark = pytest.mark.long

HOME = Path(__file__).parents[1]
RUN = """
import os, sys, threading, time
from conrec import cli, cluster, interrupt
from conrec.feedback.log import Log
from conrec.progress import console, quiet

how, interrupt.GRACE_SECONDS, log = sys.argv[1], float(sys.argv[2]), sys.argv[3]

def python():
    held = Log(2)
    console.print("waits")
    time.sleep(600)

def deaf():
    held, told = Log(2), False
    while True:
        try:
            if not told:
                told = True
                console.print("waits")
            time.sleep(600)
        except BaseException:
            pass

def ray():
    import ray
    from conrec.config import TrainSettings
    from conrec.errors import ClusterError

    lacking = cluster.training_need(TrainSettings(node_resource="nowhere"))
    try:
        cluster.connect(need=lacking)
    except ClusterError as error:
        console.print(f"refused: {error}")
    cluster.REPEAT_SECONDS = 0.1
    with cluster.announced(lacking):
        time.sleep(1)

    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    def task(end):
        open(end + ".begun", "w").close()
        while not os.path.exists(end):
            time.sleep(0.05)

    def hold(end):
        held = task.remote(end)
        while not os.path.exists(end + ".begun") or ray.available_resources().get("CPU"):
            time.sleep(0.05)
        return held

    one = cluster.training_need(TrainSettings(cpus_per_worker=1))
    cluster.tell_held(one)
    before = hold(log + ".end")
    threading.Timer(0.5, open, (log + ".end", "w")).start()
    cluster.tell_held(one)
    console.print("free again")
    running = hold(log + ".never")
    cluster.SETTLE_SECONDS = 0
    cluster.tell_held(one)
    console.print("waits")
    ray.get(running)

@cli.app.command("wait")
def wait():
    with quiet(log):
        {"python": python, "deaf": deaf, "ray": ray}[how]()

cli.main(["wait"])
"""


def interrupted(how, number, grace, folder):
    """Exit code, standard output but for "waits", standard error, and the processes that are left."""
    token = uuid.uuid4().hex
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, how, str(grace), str(folder / "log")],
        cwd=HOME,
        env=os.environ | {"CONREC_TEST": token, "RAY_TMPDIR": str(folder), "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        before = ""
        while (line := run.stdout.readline()) != "waits\n":
            assert line, run.communicate(timeout=60)
            before += line
        run.send_signal(number)
        out, error = run.communicate(timeout=60)
        _, left = psutil.wait_procs(family(token), timeout=10)
        return run.returncode, before + out, error, left
    finally:
        for process in family(token):
            process.kill()


def family(token):
    """The run and what it has started: Ray's processes leave its group, but inherit its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CONREC_TEST") == token:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_ends_with_the_line_that_goes_on(number, code, tmp_path):
    line = f"stopped by {number.name}; run the same command again: it goes on where it was\n"
    assert interrupted("python", number, 60, tmp_path) == (code, "", line, [])
    assert not list(tmp_path.glob("conrec-log-*"))


def test_a_run_that_hears_nothing_ends_all_the_same(tmp_path):
    line = "stopped by SIGTERM; run the same command again: it goes on where it was\n"
    assert interrupted("deaf", signal.SIGTERM, 0.2, tmp_path) == (143, line, "", [])
    assert not list(tmp_path.glob("conrec-log-*"))
    assert GRACE_SECONDS < 10


@pytest.mark.ray
def test_ray_tells_what_it_lacks_and_ends_with_the_run():
    folder = Path(tempfile.mkdtemp(prefix="conrec-", dir="/tmp"))  # short: Ray's sockets lie in it
    try:
        code, out, _, left = interrupted("ray", signal.SIGTERM, GRACE_SECONDS, folder)
        assert (code, left) == (143, [])
        lack = (
            "train.workers = 1 asks for 2 CPU (train.cpus_per_worker), 1 nowhere (train.node_resource) each, and there"
        )
        assert f"refused: {lack} is room for 0 of them" in out
        assert out.count(f"  waits for nodes: {lack}") > 1
        held = (
            "  waits for what others hold: train.workers = 1 asks for 1 CPU (train.cpus_per_worker) each, and there is "
            "room for 0 of them: of what the nodes have, 0 CPU are free\n"
        )
        assert out.count("others hold") == 1
        assert out.endswith(f"free again\n{held}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
