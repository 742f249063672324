"""A GRPO step of TRL's `GRPOTrainer` beside ours: the same model, prompts, group and beta, in turns.

    python3.11 -m venv runs/trl && runs/trl/bin/pip install -r benchmarks/rivals/trl/requirements.txt
    .venv/bin/python benchmarks/rivals/trl/compare.py runs/trl/bin/python            # the example's model, 1M
    .venv/bin/python benchmarks/rivals/trl/compare.py runs/trl/bin/python --smollm2  # SmolLM2's shape with LoRA, too

Prompts of 256 tokens, G = 16, three tokens a completion. TRL copies a prompt for each completion and computes G (P + 3)
tokens where a step here computes P + 3 G; it draws with replacement and from all tokens, ours from the trie. CPU
seconds of one thread, the best step of all turns; the first step of a turn warms up. Adds to benchmarks/trl.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch

HOME = Path(__file__).parents[3]
sys.path.insert(0, str(HOME / "benchmarks"))

from training_step import EXAMPLE, LEVELS, SMOLLM2, Trained, adapted, grpo_of, random_tokens, steps_of  # noqa: E402

from conrec.config import load_settings  # noqa: E402
from conrec.policy.model import save_checkpoint  # noqa: E402

LENGTH, GROUP, TURNS, STEPS = 256, 16, 2, 2
"""Tokens of a prompt, completions of it, turns of each, steps of a turn."""


def main() -> None:
    """Measures and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment with TRL")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--out", type=Path, default=HOME / "benchmarks" / "trl.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    document |= {"torch": version("torch"), "trl": trl_version(given.python)}
    texts = parquet.read_table(EXAMPLE / "items.parquet", columns=["text"])["text"].to_pylist()
    small = load_settings(EXAMPLE / "conrec.toml")
    with tempfile.TemporaryDirectory() as folder:
        models = {"example": (small, 4, 0)}
        if given.smollm2:
            models["SmolLM2-135M, LoRA r 16"] = (adapted(small, texts, SMOLLM2, Path(folder)), 1, 16)
        for name, (config, rows, rank) in models.items():
            document[name] = compared(given.python, steps_of(config, texts), rows, rank)
            print(name, json.dumps(document[name]), flush=True)
            given.out.write_text(json.dumps(document, indent=2) + "\n")


def trl_version(python: str) -> str:
    """Of the other environment."""
    asked = "from importlib.metadata import version; print(version('trl'))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


def compared(python: str, trained: Trained, rows: int, rank: int) -> dict[str, Any]:
    """Seconds of a step of each, which take turns, and the tokens that each computes by arithmetic."""
    prompts = random_tokens(trained, np.full(rows, LENGTH))
    ours = grpo_of(trained, prompts, GROUP)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(trained.learner.model, trained.tokenizer, Path(folder))
        np.save(Path(folder) / "prompts.npy", prompts.values.reshape(rows, LENGTH))
        for _ in range(TURNS):
            for step in range(1 + STEPS):
                began = time.process_time()
                ours()
                if step:
                    seconds["ours"].append(time.process_time() - began)
            theirs = of_trl(python, Path(folder), rank)
            seconds["trl"] += theirs["seconds"][1:]
    best = {name: round(min(taken), 3) for name, taken in seconds.items()}
    return {
        "prompts": rows,
        "step_seconds": best,
        "times_faster": round(best["trl"] / best["ours"], 1),
        "tokens": {"ours": rows * (LENGTH + LEVELS * GROUP), "trl": rows * GROUP * (LENGTH + LEVELS)},
        "prompt_tokens_as_trl_reads_them": theirs["prompt_tokens"],
    }


def of_trl(python: str, folder: Path, rank: int) -> dict[str, Any]:
    """What step.py prints."""
    numbers = [str(number) for number in (GROUP, LEVELS, 1 + STEPS, rank)]
    command = [python, str(Path(__file__).with_name("step.py")), str(folder), str(folder / "prompts.npy"), *numbers]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
