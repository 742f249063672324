"""How training grows with its workers: tokens a second of one, two and more of them, the same steps.

    .venv/bin/python benchmarks/workers.py 1 2 4            # the quick example; writes benchmarks/workers.json

Each is the real command with one thread a worker; a step has as many tokens whatever their number, so what is compared
is the time of equal steps. More workers than cores share them: what they then lose is what a step costs beside its
arithmetic. Medians over the steps of a phase, the first two left out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from conrec import storage
from conrec.config import load_settings
from conrec.stages.artefacts import Artefacts
from conrec.stages.run import run_stage

HOME = Path(__file__).parents[1]
EXAMPLE = HOME / "examples" / "kuairand" / "quick.toml"
RESULTS = HOME / "benchmarks" / "workers.json"
ROOT = HOME / "runs" / "workers-benchmark"
SETTINGS = (
    "timeline.refit=false",
    "supervised.warmup_epochs=1",
    'grpo.stages=[{name="recent",blocks=["recent"],steps=12,beta=0.2}]',
)


def main(numbers: list[int]) -> None:
    """Trains with each number of workers and writes the JSON."""
    shutil.rmtree(ROOT, ignore_errors=True)
    run_stage("catalogue", load_settings(EXAMPLE, [f"root={ROOT / 'base'}", *SETTINGS]))
    speeds = {workers: trained(workers) for workers in numbers}
    first = speeds[numbers[0]]
    document = {
        "cores": len(os.sched_getaffinity(0)),
        "tokens_a_second": speeds,
        f"times_those_of_{numbers[0]}": {
            workers: {phase: round(speed / first[phase], 3) for phase, speed in found.items()}
            for workers, found in speeds.items()
        },
    }
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document, indent=2))


def trained(workers: int) -> dict[str, float]:
    """Tokens a second by phase."""
    root = ROOT / str(workers)
    shutil.copytree(ROOT / "base" / "catalogue", root / "catalogue")
    given = [f"root={root}", f"train.workers={workers}", "train.cpus_per_worker=1", *SETTINGS]
    command = [sys.executable, "-m", "conrec.cli", "train", "--config", str(EXAMPLE)]
    options = [word for setting in given for word in ("--set", setting)]
    subprocess.run([*command, *options], cwd=HOME, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows: dict[str, list[Any]] = {}
    url = Artefacts(load_settings(EXAMPLE, given))["policy"].path("metrics.jsonl")
    for line in storage.read_bytes(url).decode().splitlines():
        row = json.loads(line)
        if "tokens_per_second" in row:
            rows.setdefault(row["phase"], []).append(row["tokens_per_second"])
    return {phase: round(median(found[2:]), 1) for phase, found in rows.items() if len(found) > 2}


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    main([int(number) for number in sys.argv[1:]] or [1, 2, 4])
