"""How near a GPU's limits training and the decoding of a night come: the parts that need neither Ray nor vLLM.

    python benchmarks/gpu.py                     # where a GPU is: at most four minutes; writes benchmarks/gpu.json
    python benchmarks/gpu.py --tiny --out F      # the same cells at tiny sizes, on any device: seconds

Weights are random, in the shapes of Qwen2.5-0.5B, of Qwen3-1.7B and of the example's model: nothing is downloaded. What
is timed is what trains and generates, `TrainingLoop` and `TorchEngine`. gpu_h100.json holds two such files. All figures
are of one run. After a warm-up a cell repeats until its share of the time is used, and the median counts. A cell that
fails, or comes too late, says why in its place; what is there is written after every cell. `gpu_plan.py` says what is
counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cells import Bench, cells
from gpu_clock import Cell, Clock
from gpu_plan import FULL, LEVELS, TINY, Group, Plan

from conrec.catalogue.trie import Trie

HERE = Path(__file__).parent


def main() -> None:
    """Measures the plan, writes the JSON after every cell, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=Path, help="the JSON to write; benchmarks/gpu.json unless --tiny")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no accelerator here, and on a CPU these shapes take hours: add --tiny, or run it where one is")
    out = given.out or (None if given.tiny else HERE / "gpu.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(TINY if given.tiny else FULL, device, out)
    run.measure()
    table(run.document)


@dataclass
class Run:
    """One run of a plan, and what was measured so far."""

    plan: Plan
    device: torch.device
    out: Path | None
    document: dict[str, Any] = field(default_factory=dict)

    def measure(self) -> None:
        """Fills the document with every cell of the plan."""
        self.began = time.perf_counter()
        self.clock = Clock(self.device, self.plan)
        self.document |= machine(self.device)
        self.document |= {"ceilings": self.clock.measure_ceilings(), "cells": []}
        random = np.random.default_rng(0)
        trie = Trie.build(random.integers(0, self.plan.codes, (self.plan.items, LEVELS)), self.plan.codes)
        for group in self.plan.groups:
            self.measure_group(group, trie)

    def measure_group(self, group: Group, trie: Trie) -> None:
        """All cells of one model; of one that cannot be built all say so."""
        what = {"model": group.shape.name, "dtype": group.dtype}
        built: list[Bench] = []

        def build() -> Cell:
            start = self.clock.idle()
            built.append(Bench.build(self.clock, self.plan, group, trie))
            return {"seconds": self.clock.idle() - start}

        self.cell(what | {"work": "build"}, build)
        for cell, work in cells(group):
            self.cell(what | cell, partial(asked, work, built))

    def cell(self, what: Cell, work: Callable[[], Cell]) -> None:
        """Measures one cell and writes all there is."""
        start = time.perf_counter()
        if start - self.began > self.plan.seconds:
            figures: Cell = {"failed": f"not begun: the {self.plan.seconds:g} s of the run were over"}
        else:
            figures = self.tried(work)
            figures["took_seconds"] = round(time.perf_counter() - start, 2)
        self.document["cells"].append(what | figures)
        self.document["seconds"] = round(time.perf_counter() - self.began, 1)
        print(line(what | figures), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.document, indent=2) + "\n")

    def tried(self, work: Callable[[], Cell]) -> Cell:
        """The figures, or why there are none: the next cell may well run."""
        self.clock.free()
        if self.clock.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = work()
        except torch.OutOfMemoryError as error:
            figures = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:
            figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        if self.clock.cuda:
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        # Only here: what a failed cell held is held by its traceback until the handler ends.
        self.clock.free()
        return figures


def asked(work: Callable[[Bench], Cell], built: list[Bench]) -> Cell:
    """Of the bench, where one could be built."""
    return work(built[0]) if built else {"failed": "the model was not built"}


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures are from, and of which code."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def commit() -> str | None:
    """Of the checkout, `+` behind it where files differ; None where there is no checkout."""
    git = ["git", "-C", str(HERE)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


COLUMNS = {
    "ms": ("seconds", 1e3),
    "tokens/s": ("tokens_per_second", 1),
    "users/s": ("users_per_second", 1),
    "of prompts only": ("share_of_prompts_only", 1),
    "times the limit": ("times_forward_and_backward", 1),
    "of FLOP/s": ("flops_share", 1),
    "of bytes/s": ("bytes_share", 1),
    "trie": ("trie_share", 1),
    "busy": ("busy_share", 1),
    "GiB": ("peak_gib", 1),
}


def name_of(cell: Cell) -> str:
    """What was measured, with its sizes."""
    sizes = (f"{key} {cell[key]}" for key in ("prompt_tokens", "group", "width", "positions") if key in cell)
    return f"{cell['model']} {cell['dtype']} {cell['work']} {' '.join(sizes)}".strip()


def line(cell: Cell) -> str:
    """One cell in words, as it ends."""
    if "failed" in cell:
        return f"{name_of(cell)}: {cell['failed']}"
    figures = (f"{title} {cell[key] * scale:.4g}" for title, (key, scale) in COLUMNS.items() if key in cell)
    return f"{name_of(cell)}: {', '.join(figures)}"


def table(document: dict[str, Any]) -> None:
    """All cells, as Markdown."""
    print(f"\n{document['device']}, ceilings {document['ceilings']}, {document['seconds']} s in all\n")
    print(f"| | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' ---: |' * len(COLUMNS)}")
    for cell in document["cells"]:
        if "failed" in cell:
            print(f"| {name_of(cell)}: {cell['failed']} |{' |' * len(COLUMNS)}")
            continue
        values = (f"{cell[key] * scale:.4g}" if key in cell else "" for key, scale in COLUMNS.values())
        print(f"| {name_of(cell)} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
