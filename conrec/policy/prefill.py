"""Prompts that are computed once, and what continues from them: the keys and values of every layer.

    read = read_prompts(model, prompts, device, room)         # by the model itself
    read = from_packed(last, layers, prompts, model, room)    # by an engine that packs them

Decoding asks for no more of a prompt than `Read`: whoever computes it, beams continue in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conrec.policy.head import decoder_and_head
from conrec.ragged import Ragged


class Read(NamedTuple):
    """Prompts of a batch behind the last layer and, padded behind their ends, in a cache of keys and values."""

    last: Tensor
    """Shape: (B, H), the state at the end of each prompt, from which the head says what comes next."""
    lengths: Tensor
    """Shape: (B,) int64."""
    longest: int
    """Positions in the cache, padding included."""
    cache: Any
    """Of transformers; each layer has keys and values (B, heads, longest, size)."""

    @property
    def visible(self) -> Tensor:
        """Which positions of the cache are real. Shape: (B, longest) bool."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]


ReadPrompts = Callable[[Any, Ragged, torch.device, int], Read]
"""Model, prompts, device, and how many positions will follow each prompt -> the prompts, computed."""


def read_prompts(model: Any, prompts: Ragged, device: torch.device, room: int) -> Read:
    """One forward of the model over padded prompts, differentiable where gradients are on."""
    tokens, lengths = pad(prompts, device)
    decoder = decoder_and_head(model)[0]
    cache = _empty(decoder, room)
    # Padding stands after the prompt, where no prompt token sees it: plain causal attention is right.
    hidden = decoder(input_ids=tokens, past_key_values=cache, use_cache=True).last_hidden_state
    return Read(hidden[torch.arange(len(tokens), device=device), lengths - 1], lengths, tokens.shape[1], cache)


def from_packed(last: Tensor, layers: list[tuple[Tensor, ...]], prompts: Ragged, model: Any, room: int) -> Read:
    """What an engine computed of prompts without padding, one after the other, as the model would have read it.

    Shape: last (B, H); of each layer keys and values (N, heads, size) for N = the tokens of all prompts.
    """
    decoder = decoder_and_head(model)[0]
    offsets = torch.as_tensor(prompts.offsets, dtype=torch.int64, device=last.device)
    lengths = offsets[1:] - offsets[:-1]
    longest = int(prompts.lengths.max())
    cache = _empty(decoder, room)
    # What stands behind the end of a prompt is of another one; nobody sees it.
    places = (offsets[:-1, None] + torch.arange(longest, device=last.device)).clamp_max(int(prompts.offsets[-1]) - 1)
    whole = len(prompts.values) == places.numel()
    for layer, packed in enumerate(layers):
        rows = (one.unflatten(0, places.shape) if whole else one[places] for one in packed)
        cache.update(*(one.to(decoder.dtype).transpose(1, 2) for one in rows), layer)
    return Read(last.to(decoder.dtype), lengths, longest, cache)


def _empty(decoder: Any, room: int) -> Any:
    """A cache; with gradients one that keeps what its steps had."""
    from transformers import DynamicCache  # loaded with the model, where there is one

    if torch.is_grad_enabled():
        return DynamicCache(config=decoder.config)
    from conrec.policy.cache import roomy

    return roomy(decoder.config.num_hidden_layers, room)


def pad(prompts: Ragged, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded behind their ends, and their lengths. Shape: (B, longest) int64, (B,) int64.

    Raises `ValueError` for an empty prompt.
    """
    if prompts.lengths.min(initial=1) < 1:
        raise ValueError(f"prompt {int(prompts.lengths.argmin())} is empty; a prompt holds at least one begin mark")
    tokens = torch.as_tensor(prompts.padded(0), dtype=torch.int64, device=device)
    return tokens, torch.as_tensor(prompts.lengths, dtype=torch.int64, device=device)
