"""An engine's process is killed while it generates, on the Ray of the session: a fresh one goes on, a bounded number of
times, and every user has what an undisturbed engine answers. Meanwhile Ray exports what the engine counts."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from tiny_policy import TRIE, committed, prompts_table, save_tiny

from conrec.blocklist import generate
from conrec.blocklist.batches import generate_batch
from conrec.blocklist.engines import TorchEngine
from conrec.blocklist.meters import COUNTERS, GAUGES, Meters
from conrec.config import GenerateSettings
from conrec.errors import ClusterError
from conrec.ragged import Ragged

pytestmark = pytest.mark.ray

USERS = 320  # ten files
SETTINGS = GenerateSettings(beam_width=36, batch_size=8, engine="torch")


@pytest.fixture
def connected(ray_head, monkeypatch):
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address=ray_head.address, log_to_driver=False, configure_logging=False)
    yield ray_head
    ray.shutdown()


def engines(head) -> list[psutil.Process]:
    """Processes that hold an engine."""
    found = []
    for process in head.children():
        with contextlib.suppress(psutil.Error):
            found += [process] if "_Generator" in " ".join(process.cmdline()) else []
    return found


def killing(head, folder: Path, files: int) -> threading.Thread:
    """Kills the engine once so many files of the night are written, while it generates the next one."""

    def run() -> None:
        while not (found := engines(head)):
            time.sleep(0.05)
        while len(committed(folder)) < files:
            time.sleep(0.01)
        for process in found:
            process.kill()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def exported() -> dict[str, float]:
    """What the nodes export of the engines, summed over those that there were."""
    sums: dict[str, float] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_conrec_engine_"):
                    name = sample.name.removeprefix("ray_conrec_engine_").removesuffix("_total")
                    sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def test_an_engine_that_is_killed_is_replaced_and_the_night_ends_as_if_it_had_not_been(
    connected, tmp_path, monkeypatch
):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_tiny(checkpoint)
    engine = TorchEngine.load(checkpoint, TRIE)
    table = prompts_table(engine.vocabulary, USERS, length=224)
    (tmp_path / "prompts").mkdir()
    pq.write_table(table, tmp_path / "prompts" / "000000.parquet")
    places = [str(tmp_path / name) for name in ("prompts", "generated")]

    def night() -> int:
        return generate.generate_night(*places, str(checkpoint), TRIE, SETTINGS, str(tmp_path / "progress"), USERS)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "ENGINE_RESTARTS", 0)
        killer = killing(connected, tmp_path, files=1)
        with pytest.raises(ClusterError, match="an engine was lost and started again 0 times"):
            night()
        killer.join()
    kept = len(committed(tmp_path))
    killer = killing(connected, tmp_path, files=kept + 1)
    assert night() == USERS
    killer.join()
    assert 0 < kept < kept + 1 < len(committed(tmp_path))
    rows = pq.read_table(tmp_path / "generated").sort_by("user_id")
    wanted = generate_batch(engine, table, SETTINGS.beam_width)
    for name in ("user_id", "leaves", "error", "digest"):
        assert rows[name].to_pylist() == wanted[name].to_pylist(), name
    for name in ("log_probs", "verdicts"):
        found, values = (Ragged.from_arrow(one[name]).values for one in (rows, wanted))
        np.testing.assert_allclose(found, values, atol=1e-4)


def test_an_engine_that_does_not_start_is_told_with_its_cause(connected, tmp_path):
    """A file of weights that is none: nothing that the engine's own errors name."""
    save_tiny(tmp_path / "checkpoint")
    vocabulary = TorchEngine.load(tmp_path / "checkpoint", TRIE).vocabulary
    (tmp_path / "prompts").mkdir()
    pq.write_table(prompts_table(vocabulary, 8), tmp_path / "prompts" / "000000.parquet")
    (weights,) = (tmp_path / "checkpoint").glob("*.safetensors")
    weights.write_bytes(b"none")
    places = [str(tmp_path / name) for name in ("prompts", "generated", "checkpoint")]
    with pytest.raises(ClusterError, match=r"an engine did not start: .*SafetensorError: .*; look at the memory"):
        generate.generate_night(*places, TRIE, SETTINGS, str(tmp_path / "progress"), 8)


def test_ray_exports_what_an_engine_counts(connected):
    before = exported()
    errors = pa.array(["failed", None, None], pa.string())
    batch = pa.table({"error": errors, "leaves": [[], [4, 5], [6]]})
    meters = ray.remote(Meters).options(num_cpus=0).remote()
    ray.get(meters.count.remote(batch, 2.0))
    until = time.monotonic() + 60
    while (now := exported()).keys() != {*COUNTERS, *GAUGES}:
        assert time.monotonic() < until, now
        time.sleep(0.2)
    added = {name: now[name] - before.get(name, 0) for name in now}
    assert added == {"users": 3, "failed_users": 1, "ids": 3, "users_per_second": 1.5}
