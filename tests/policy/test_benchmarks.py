"""The benchmarks of training and of the GPU run, at sizes that take seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]


@pytest.mark.long
def test_the_benchmark_of_the_training_step_runs(tmp_path):
    command = [sys.executable, "benchmarks/training_step.py", "--tiny", "--out", str(tmp_path / "out.json")]
    subprocess.run(command, cwd=HOME, env=os.environ | {"PYTHONPATH": str(HOME)}, check=True, capture_output=True)
    models = json.loads((tmp_path / "out.json").read_text())["models"]
    assert len(models) == 2
    for model in models.values():
        kinds = {label.split(",")[0] for label in model["steps"]}
        assert kinds == {"supervised", "grpo"}
        assert all(cell["step_seconds"] > 0 and cell["ratio"] > 0 for cell in model["steps"].values())
        told = json.loads((HOME / "benchmarks" / "training_step.json").read_text())["models"]
        assert models.keys() == told.keys()


@pytest.mark.long
def test_the_benchmark_of_the_gpu_runs_without_one(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--out", str(tmp_path / "out.json")]
    subprocess.run(command, cwd=HOME, env=os.environ | {"PYTHONPATH": str(HOME)}, check=True, capture_output=True)
    document = json.loads((tmp_path / "out.json").read_text())
    assert not [cell for cell in document["cells"] if "failed" in cell]
    measured = {cell["work"] for cell in document["cells"]}
    assert measured > {"supervised step", "GRPO step", "decoding with verdicts", "kernels of decoding"}
