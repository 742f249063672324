"""The clock of `benchmarks/gpu.py`: read once the device is idle; and what its device can do at most."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from gpu_plan import DTYPES, Plan

Cell = dict[str, Any]
REPEATS = 10
"""Of one cell at most."""


@dataclass
class Clock:
    """Times work on a device. `flops`, by precision, and `bytes_per_second`: the ceilings, once they are measured."""

    device: torch.device
    plan: Plan
    flops: dict[str, float] = field(default_factory=dict)
    bytes_per_second: float = 0.0

    @property
    def cuda(self) -> bool:
        """Whether work is done while this program goes on."""
        return self.device.type == "cuda"

    def measure_ceilings(self) -> dict[str, Any]:
        """Operations a second by precision, and bytes a second."""
        for group in self.plan.groups:
            if group.dtype not in self.flops:
                self.flops[group.dtype] = self._product(DTYPES[group.dtype])
        self.bytes_per_second = self._copy()
        self.free()
        return {"flops": self.flops, "bytes_per_second": self.bytes_per_second}

    def _product(self, dtype: torch.dtype) -> float:
        """Operations a second of one large square product."""
        size = self.plan.matrix
        left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return float(2 * size**3 / self.seconds(lambda: torch.mm(left, right))["seconds"])

    def _copy(self) -> float:
        """Bytes a second, read and written, of one copy on the device."""
        source = torch.zeros(self.plan.copy_mib * 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return float(2 * source.numel() / self.seconds(lambda: target.copy_(source))["seconds"])

    def idle(self) -> float:
        """The time, once the device has done all that it was given."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> Cell:
        """Median of as many repeats as fit into a cell, at least one, after one that is not counted."""
        work()
        taken: list[float] = []
        began = self.idle()
        while len(taken) < REPEATS and (not taken or self.idle() - began < self.plan.cell_seconds):
            start = self.idle()
            work()
            taken.append(self.idle() - start)
        return {"seconds": median(taken), "repeats": len(taken)}

    def shares(self, figures: Cell, dtype: str, flops: float, moved: float = 0.0) -> Cell:
        """The figures with operations and bytes a second, and their shares of the ceilings."""
        rate = flops / figures["seconds"]
        figures = figures | {"flops": rate, "flops_share": rate / self.flops[dtype]}
        if moved:
            rate = moved / figures["seconds"]
            figures |= {"bytes_per_second": rate, "bytes_share": rate / self.bytes_per_second}
        return figures

    def free(self) -> None:
        """Gives back what nothing refers to."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
