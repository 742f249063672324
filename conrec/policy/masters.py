"""Float32 master weights and gradients of the trained parameters, whatever the model computes in.

    masters.clear(); masters.backward(loss) of every micro-batch; a step of `masters.values`; masters.give()

bfloat16 keeps 8 bits of a weight: a step of 1e-6 on a weight of .02 would be rounded away, whenever it comes. So the
optimiser steps float32 masters, the micro-batches' gradients add up in float32, and after each step the model gets the
masters, rounded once. Parameters in float32 are their own masters: nothing is held twice.

Invariant: the model's parameters are the masters in the model's precision, before and after every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Masters:
    """Masters, and their gradients in one buffer.

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

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies of the masters, by name."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets masters and parameters to what `copies` returned."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(tensors[name])
        self.give()

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

    def give(self) -> None:
        """Gives the model what the masters are, rounded."""
        with torch.no_grad():
            for name, value in self.rounded().items():
                self.parameters[name].copy_(value)
