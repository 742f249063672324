"""A cache of keys and values with room for what will follow a prompt, for use without gradients.

    cache = roomy(layers, room)       # what transformers asks of a `Cache`

The cache of transformers grows by copying: three steps of twenty beams copy their prompt three times, a sixth of what
they cost after prompts of 64 tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicLayer


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
            shapes = [(*one.shape[:2], one.shape[2] + self.room, one.shape[3]) for one in given]
            self.held = [one.new_empty(shape) for one, shape in zip(given, shapes, strict=True)]
            self.used = 0
        end = self.used + key_states.shape[2]
        for held, one in zip(self.held, given, strict=True):
            held[:, :, self.used : end] = one
        self.used = end
        self.keys, self.values = (held[:, :, :end] for held in self.held)
        return self.keys, self.values
