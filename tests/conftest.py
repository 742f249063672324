"""What all tests share: a profile of Hypothesis, a Ray for those that do not kill it, and a run that is finished."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import settings
from small_example import command, run, write_tables

# A deadline of milliseconds would fail on a machine that is busy.
settings.register_profile("conrec", deadline=None)
settings.load_profile("conrec")


@dataclass(frozen=True)
class RayHead:
    """A Ray head of this session, on this machine."""

    process: subprocess.Popen
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """With which a command joins it."""
        return {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}

    def children(self) -> list[psutil.Process]:
        """Its daemons and workers."""
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """Two cores, and nothing that no test asks for: started once, for jobs that join it by its address."""
    # What the tests pickle by name is imported by the workers.
    path = [str(Path(__file__).parent / "policy"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)}
    environment |= {"RAY_enable_metrics_collection": "1", "RAY_metrics_report_interval_ms": "1000"}
    with started_head(2, os.environ | environment) as head:
        yield head


@contextlib.contextmanager
def started_head(cores: int, environment: Mapping[str, str]) -> Iterator[RayHead]:
    """A head node of its own, without the dashboard."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", f"--num-cpus={cores}"]
    without = ["--include-dashboard=false", "--include-log-monitor=false"]
    process = subprocess.Popen(
        [*start, *without, "--block", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    while not _answers(port):
        assert process.poll() is None, "Ray did not start"
        time.sleep(0.1)
    head = RayHead(process, port)
    try:
        yield head
    finally:
        # Only what was started here: other Ray sessions may run on the machine.
        for one in [*head.children(), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def ray_driver(ray_head: RayHead) -> Iterator[None]:
    """This process as a driver on the Ray of the session, which nobody kills."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(address=ray_head.address, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The root of a whole `conrec run` on a little of the example, with a Ray of its own, and what it said."""
    root = tmp_path_factory.mktemp("example") / "run"
    write_tables(root.parent)
    return root, run(command(root, sys.executable, "-m", "conrec.cli", "run"), OMP_NUM_THREADS="1")


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
