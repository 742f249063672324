"""Float32 master weights and gradients of the trained parameters, whatever the model computes in.

    masters.clear(); masters.backward(loss) of every micro-batch; a step of `masters.values`; masters.give()

bfloat16 keeps 8 bits of a weight: a step of 1e-6 on a weight of .02 would be rounded away, whenever it comes. So the
optimiser steps float32 masters, the micro-batches' gradients add up in float32, and after each step the model gets the
masters, rounded once. Parameters in float32 are their own masters: nothing is held twice.

Of several workers each holds a share of the masters and of all that there is of each of them: what the optimiser keeps,
and the states that a stage returns to (ZeRO, stage 1: Rajbhandari et al. 2020, arXiv 1910.02054). Model and gradient
are whole on every worker, since each has its own number of micro-batches and cannot wait for another inside one.

Invariant: the model's parameters are the masters in the model's precision, before and after every step. `give`, `whole`
and `collected` are called by all workers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce

import torch
import torch.distributed as distributed

PIECE = 1 << 24
"""Numbers that one worker tells the others at once: 64 MiB in float32."""


class Masters:
    """Masters, and the gradients of all parameters in one buffer.

    `tensors` holds, by name, whole masters of parameters that are less precise (of a checkpoint, or what training
    starts from); those that it lacks are the parameters themselves. `values` holds the masters of this worker's share,
    by name: flat where a parameter is cut, else in its shape. `precision`: the finest that a parameter has.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
        self.parameters = dict(parameters)
        device = next(iter(self.parameters.values())).device
        self.gradient = torch.zeros(sum(one.numel() for one in self.parameters.values()), device=device)
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.precision = reduce(torch.promote_types, {one.dtype for one in self.parameters.values()})
        self._gradients: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.nn.Parameter] = {}
        place = 0
        for name, parameter in self.parameters.items():
            self._gradients[name] = self.gradient[place : place + parameter.numel()].view_as(parameter)
            place += parameter.numel()
            if parameter.dtype == torch.float32:
                parameter.grad = self._gradients[name]
        for name, part in self.part(self.parameters).items():
            if part.dtype != torch.float32:
                given = self.part({name: tensors[name].detach()})[name] if name in tensors else part
                part = given.to(device, torch.float32).clone()
            self.values[name] = torch.nn.Parameter(part)
        for name, gradient in self.part(self._gradients).items():
            self.values[name].grad = gradient

    def part(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of whole tensors by the names of parameters, what this worker holds the masters of: views."""
        parts = {}
        for name, cut, _ in self._cuts(*self._share(self.rank)):
            if name in tensors:
                whole = tensors[name].detach()
                parts[name] = whole if cut.stop - cut.start == whole.numel() else whole.reshape(-1)[cut]
        return parts

    def rounded(self) -> dict[str, torch.Tensor]:
        """The masters that the model holds less precisely, by name: what a checkpoint has to keep."""
        return {
            name: value.detach() for name, value in self.values.items() if self.parameters[name].dtype != torch.float32
        }

    def clear(self) -> None:
        """Begins a step: no gradient yet."""
        self.gradient.zero_()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, which then holds its graph no longer.

        Less precise gradients are added as each is there: together they would be as large as the model.
        """
        coarse = [(name, one) for name, one in self.parameters.items() if one.dtype != torch.float32]
        hooks = [one.register_post_accumulate_grad_hook(partial(self._add, name)) for name, one in coarse]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._gradients[name] += parameter.grad
        parameter.grad = None

    def copies(self) -> dict[str, torch.Tensor]:
        """Copies of this worker's masters, by name."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Sets masters and parameters to what `copies` returned."""
        with torch.no_grad():
            for name, value in self.values.items():
                value.copy_(tensors[name])
        self.give()

    @contextmanager
    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The model with other tensors, whole ones, in place of its trained ones, for the length of the block."""
        held = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name].to(parameter.dtype)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = held[name]

    def give(self) -> None:
        """Gives the model what the masters of all workers are, rounded."""
        if self.world > 1:
            self._tell(self.values, self.parameters, self.precision)
            return
        with torch.no_grad():
            for name, value in self.rounded().items():
                self.parameters[name].copy_(value)

    def whole(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of which every worker has its part, for the model: in its precision."""
        if self.world == 1:
            return dict(parts)
        tensors = {name: torch.empty_like(parameter.detach()) for name, parameter in self.parameters.items()}
        self._tell(parts, tensors, self.precision)
        return tensors

    def collected(self, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of which every worker has its part, for a file: float32, in the first worker's memory; nothing on the
        others. Names of which there are no parts are left out."""
        if self.world == 1:
            return dict(parts)
        known = torch.tensor(
            [name in parts for name in self.parameters], dtype=torch.int32, device=self.gradient.device
        )
        distributed.all_reduce(known)
        names = [name for name, held in zip(self.parameters, known.tolist(), strict=True) if held]
        tensors = {name: torch.empty(self.parameters[name].shape) for name in names if self.rank == 0}
        if names:
            self._tell(parts, tensors, torch.float32)
        return tensors

    def _tell(
        self, parts: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], precision: torch.dtype
    ) -> None:
        """Writes every worker's parts into whole tensors; they travel in this precision."""
        for rank in range(self.world):
            first, end = self._share(rank)
            begins = {name: cut.start for name, cut, _ in self._cuts(first, end)}
            for start in range(first, end, PIECE):
                stop = min(end, start + PIECE)
                told = self.gradient.new_zeros(stop - start, dtype=precision)
                if rank == self.rank:
                    for name, cut, at in self._cuts(start, stop):
                        if name in parts:
                            part = parts[name].detach().reshape(-1)
                            told[at] = part[cut.start - begins[name] : cut.stop - begins[name]]
                distributed.broadcast(told, rank)
                with torch.no_grad():
                    for name, cut, at in self._cuts(start, stop):
                        if name in tensors:
                            tensors[name].view(-1)[cut] = told[at].to(tensors[name])

    def _share(self, rank: int) -> tuple[int, int]:
        """Where a worker's share of all numbers begins and ends."""
        total = len(self.gradient)
        return rank * total // self.world, (rank + 1) * total // self.world

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
        """Of a range of all numbers: name, which numbers of that parameter, and where in the range they lie."""
        place = 0
        for name, parameter in self.parameters.items():
            first, last = max(start, place), min(stop, place + parameter.numel())
            if first < last:
                yield name, slice(first - place, last - place), slice(first - start, last - start)
            place += parameter.numel()
