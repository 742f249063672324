"""Float32 master weights and gradients of the trained parameters, whatever the model computes in.

    masters.clear(); masters.backward(loss) of every micro-batch; masters.apply(optimiser, scale)

bfloat16 keeps 8 bits of a weight: a step of 1e-6 on a weight of .02 would be rounded away, whenever it comes. So the
optimiser steps float32 masters, the micro-batches' gradients add up in float32, and after each step the model gets the
masters, rounded once. Parameters in float32 are their own masters: nothing is held twice.

Invariant: the model's parameters are the masters in the model's precision, before and after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as distributed

LARGEST_NORM = 1.0
"""Gradients are clipped to this global norm."""


class Masters:
    """Masters, their gradients in one buffer, and the sum over the workers.

    `tensors` holds, by name, masters of parameters that are less precise (of a checkpoint, or what training starts
    from); those that it lacks are the parameters themselves.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        self.parameters = dict(parameters)
        self.values = {
            name: parameter
            if parameter.dtype == torch.float32
            else torch.nn.Parameter(tensors.get(name, parameter).detach().to(parameter.device, torch.float32).clone())
            for name, parameter in self.parameters.items()
        }
        device = next(iter(self.values.values())).device
        self.gradient = torch.zeros(sum(value.numel() for value in self.values.values()), device=device)
        place = 0
        for value in self.values.values():
            value.grad = self.gradient[place : place + value.numel()].view_as(value)
            place += value.numel()

    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters that the model holds less precisely, by name: what a checkpoint has to keep."""
        return {name: value.detach() for name, value in self.values.items() if value is not self.parameters[name]}

    def optimiser(self, weight_decay: float, kept: Mapping[str, torch.Tensor]) -> torch.optim.Optimizer:
        """AdamW over the masters; `kept` is what `kept_of` returned, or empty."""
        # Fused: a third of the time of one operation after the other.
        optimiser = torch.optim.AdamW(
            self.values.values(), lr=0.0, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )
        if kept:
            for name, value in self.values.items():
                optimiser.state[value] = {
                    key: kept[f"{name}/{key}"].to(value.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
        return optimiser

    def kept_of(self, optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """What the optimiser keeps, as one dictionary of tensors."""
        return {
            f"{name}/{key}": tensor
            for name, value in self.values.items()
            for key, tensor in optimiser.state[value].items()
        }

    def clear(self) -> None:
        """Begins a step: no gradient yet."""
        self.gradient.zero_()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, which then holds its graph no longer."""
        loss.backward()
        for name, parameter in self.parameters.items():
            held = self.values[name].grad
            if parameter is not self.values[name] and parameter.grad is not None and held is not None:
                held += parameter.grad
                parameter.grad = None

    def apply(self, optimiser: torch.optim.Optimizer, scale: float) -> None:
        """Sums the gradient over the workers, scales and clips it, steps, and gives the model what came out."""
        self.gradient *= scale
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(self.gradient)
        # Clipping by the global norm, on the summed gradient: the same on every worker.
        self.gradient *= torch.clamp(LARGEST_NORM / (self.gradient.norm() + 1e-6), max=1.0)
        optimiser.step()
        self._give()

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies of the masters, by name."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets masters and parameters to what `copies` returned."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(tensors[name])
        self._give()

    @contextmanager
    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with other tensors in place of its trained ones, for the length of the block."""
        held = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = held[name]

    def _give(self) -> None:
        with torch.no_grad():
            for name, value in self.rounded().items():
                self.parameters[name].copy_(value)
