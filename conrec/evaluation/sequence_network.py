"""Causal transformers over a user's items, small and in plain torch: what the sequential models are made of.

    network = Network(recipe, known_items=1000, hidden=64)
    states = network.states(0, sequences)       # (B, T + 1, d)
    scores = network.logits(states[:, -1])      # (B, known items)

Invariant: a state reads what lies before it in its own sequence, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from conrec.evaluation.baselines import EVERYTHING
from conrec.ragged import Ragged

LAYERS, HEADS, DROPOUT = 2, 2, 0.2
MAX_LENGTH = 50
"""So many of a user's latest events are read."""


@dataclass(frozen=True)
class Recipe:
    """How a kind is trained and ranked: the kinds of event that each encoder reads, the kinds whose items get more
    and less probability; `sign` -1 ranks by the lowest probability. The first encoder is the one that ranks."""

    streams: tuple[tuple[int, ...], ...]
    pulled: tuple[int, ...]
    pushed: tuple[int, ...] = ()
    sign: int = 1


@dataclass(frozen=True)
class Sequences:
    """Sequences of known items, oldest first, by their codes; `kinds` int8 beside items.values."""

    items: Ragged
    kinds: np.ndarray

    @property
    def typed(self) -> Ragged:
        """The kinds in the same rows."""
        return Ragged(self.kinds, self.items.offsets)

    def without_last(self) -> Sequences:
        """The sequences without the last item of each."""
        kept = np.ones(len(self.kinds), bool)
        kept[self.items.offsets[1:][self.items.lengths > 0] - 1] = False
        lengths = np.maximum(self.items.lengths - 1, 0)
        return Sequences(Ragged.from_lengths(self.items.values[kept], lengths), self.kinds[kept])

    def take(self, rows: np.ndarray) -> Sequences:
        """The sequences at the given positions, in that order."""
        return Sequences(self.items.take(rows), self.typed.take(rows).values)


class _Block(nn.Module):
    """Causal self-attention, then a feed-forward layer as wide as the model, each normalised first and added."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.forward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention, self.mix = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.widen, self.narrow = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, states: Tensor) -> Tensor:
        """New states (B, T, d) from states (B, T, d)."""
        rows, length, hidden = states.shape
        parts = self.attention(self.attention_norm(states)).view(rows, length, 3, HEADS, hidden // HEADS)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.dropout(self.mix(seen.transpose(1, 2).reshape(rows, length, hidden)))
        return states + self.dropout(self.narrow(functional.relu(self.widen(self.forward_norm(states)))))


class _Encoder(nn.Module):
    """A causal transformer over embedded items; its first position is the start of the sequence, before any item."""

    def __init__(self, hidden: int, typed: bool) -> None:
        super().__init__()
        self.positions = nn.Embedding(MAX_LENGTH + 1, hidden)
        self.kinds = nn.Embedding(len(EVERYTHING) + 1, hidden) if typed else None
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(_Block(hidden) for _ in range(LAYERS)), nn.LayerNorm(hidden))

    def forward(self, embedded: Tensor, kinds: Tensor) -> Tensor:
        """States (B, T, d) of items (B, T, d) and their kinds (B, T); padding stands at the end, where no state
        before it looks."""
        inputs = embedded * embedded.shape[2] ** 0.5 + self.positions.weight[: embedded.shape[1]]
        if self.kinds is not None:
            inputs = inputs + self.kinds(kinds)
        return self.blocks(self.dropout(inputs))


class Network(nn.Module):
    """Encoders over shared embeddings of the known items, which are also what states are compared with."""

    def __init__(self, recipe: Recipe, known_items: int, hidden: int) -> None:
        super().__init__()
        self.items = nn.Embedding(known_items + 1, hidden)
        self.bias = nn.Parameter(torch.zeros(known_items))
        self.encoders = nn.ModuleList(_Encoder(hidden, len(stream) > 1) for stream in recipe.streams)
        self.apply(_initialise)

    @property
    def start(self) -> int:
        """The embedding that stands before the first item; its kind is the one behind all kinds."""
        return self.items.num_embeddings - 1

    def states(self, encoder: int, sequences: Sequences) -> Tensor:
        """States (B, T + 1, d) of sequences up to T long: before the first item, then after each one."""
        edge = ((0, 0), (1, 0))
        items = np.pad(sequences.items.padded(0), edge, constant_values=self.start)
        kinds = np.pad(sequences.typed.padded(0), edge, constant_values=len(EVERYTHING))
        return self.encoders[encoder](self.items(torch.from_numpy(items).long()), torch.from_numpy(kinds).long())

    def logits(self, states: Tensor) -> Tensor:
        """Scores (N, known items) of states (N, d)."""
        return functional.linear(states, self.items.weight[:-1], self.bias)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
