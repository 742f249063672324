"""AdamW over the masters: the gradient of all workers, clipped by its norm, stepped at a rate that follows the phase.

    optimiser = Optimiser(masters, weight_decay=WEIGHT_DECAY, kept={})
    masters.clear(); masters.backward(loss) of every micro-batch; optimiser.step(1 / count, rate)

Invariant: an optimiser of what `kept` returned goes on as the one that it is of, to the last bit. Each worker has the
moments of its share of the masters (`conrec.policy.masters`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as distributed

from conrec.policy.masters import Masters

LARGEST_NORM = 1.0
"""Gradients are clipped to this global norm."""
WEIGHT_DECAY = 0.01
"""Of supervised training. Stages of GRPO have none: their KL divergence holds them where they start."""
WARM_STEPS = 10
"""Steps over which the rate of a stage rises."""
_KEPT = ("step", "exp_avg", "exp_avg_sq")


class Optimiser:
    """`kept` is what `kept` returned on this worker, or empty.

    `norm`: of the gradient of the last step, summed over the workers and not yet clipped, the same on each of them.
    """

    def __init__(self, masters: Masters, weight_decay: float, kept: Mapping[str, torch.Tensor]) -> None:
        self.masters, self.norm = masters, 0.0
        # Fused: a third of the time of one operation after the other.
        self._adam = torch.optim.AdamW(
            masters.values.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        if kept:
            for name, value in masters.values.items():
                self._adam.state[value] = {key: kept[f"{name}/{key}"].to(value.device) for key in _KEPT}

    def step(self, scale: float, rate: float) -> None:
        """Sums the gradient over the workers, scales and clips it, steps, and gives the model what came out."""
        gradient = self.masters.gradient
        gradient *= scale
        if self.masters.world > 1:
            distributed.all_reduce(gradient)
        # Clipping by the global norm, on the summed gradient: the same on every worker.
        norm = gradient.norm()
        gradient *= torch.clamp(LARGEST_NORM / (norm + 1e-6), max=1.0)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        self.masters.give()
        self.norm = float(norm)

    def kept(self) -> dict[str, torch.Tensor]:
        """What is to be kept of this worker's share, as one dictionary of tensors."""
        return {
            f"{name}/{key}": tensor
            for name, value in self.masters.values.items()
            for key, tensor in self._adam.state[value].items()
        }


def collected(kept: Mapping[str, torch.Tensor], masters: Masters) -> dict[str, torch.Tensor]:
    """Of what every worker's optimiser keeps the whole, as `Masters.collected`."""
    if not kept:
        return {}
    # All masters have been stepped as often.
    step = kept[f"{next(iter(masters.values))}/step"]
    whole = {f"{name}/step": step.clone() for name in masters.parameters}
    for key in _KEPT[1:]:
        tensors = masters.collected({name: kept[f"{name}/{key}"] for name in masters.values})
        whole |= {f"{name}/{key}": tensor for name, tensor in tensors.items()}
    return whole


def part(kept: Mapping[str, torch.Tensor], masters: Masters) -> dict[str, torch.Tensor]:
    """Of what `collected` returned this worker's share."""
    if not kept:
        return {}
    share = {f"{name}/step": kept[f"{name}/step"] for name in masters.values}
    for key in _KEPT[1:]:
        named = {name: kept[f"{name}/{key}"] for name in masters.values}
        share |= {f"{name}/{key}": tensor for name, tensor in masters.part(named).items()}
    return share


def cosine(step: int, steps: int) -> float:
    """Factor on the rate of supervised training: linear over the first 5 %, then a cosine to a tenth."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def rising(step: int) -> float:
    """Factor on the rate of a stage: linear over the first steps, then 1."""
    return min(1.0, (step + 1) / WARM_STEPS)
