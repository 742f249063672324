"""A cache of keys and values with room for what will follow a prompt, for use without gradients.

    cache = roomy(layers, room)       # what transformers asks of a `Cache`

The cache of transformers grows by copying: three steps of twenty beams copy their prompt three times, a sixth of what
they cost after prompts of 64 tokens. And what follows a prompt is given all positions up to a multiple of `ALIGNED`,
zeros behind the last: attention over 128 positions takes no longer than over 124, and on a CPU less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicLayer

ALIGNED = 16


def aligned(visible: Tensor) -> Tensor:
    """What is seen of all positions that such a cache gives: nothing of its zeros. Shape: (..., T) bool."""
    return functional.pad(visible, (0, -visible.shape[-1] % ALIGNED))


def roomy(layers: int, room: int) -> Cache:
    """An empty cache whose layers hold `room` positions beside those that they are given first."""
    return Cache(layers=[_RoomyLayer(room) for _ in range(layers)])


class _RoomyLayer(DynamicLayer):
    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes behind what is there. Shape: (B, heads, T, size) each -> (B, heads, all, size) each."""
        given = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(*given)
            end = key_states.shape[2] + self.room
            shapes = [(*one.shape[:2], end - end % -ALIGNED, one.shape[3]) for one in given]
            self.held = [one.new_empty(shape) for one, shape in zip(given, shapes, strict=True)]
            for held in self.held:
                held[:, :, key_states.shape[2] :] = 0
            self.used = 0
        first, self.used = self.used, self.used + key_states.shape[2]
        for held, one in zip(self.held, given, strict=True):
            held[:, :, first : self.used] = one
        self.keys, self.values = (held[:, :, : self.used] for held in self.held)
        # A prompt sees itself, causally, without a mask that would hide the zeros.
        end = self.used - self.used % -ALIGNED if first else self.used
        return self.held[0][:, :, :end], self.held[1][:, :, :end]
