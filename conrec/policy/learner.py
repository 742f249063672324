"""One worker's model, and how a step is cut to its memory and added up over all workers.

A step is computed in micro-batches of at most `tokens_at_once` positions: rows of like length, whose losses are
sums, so that their gradients add up to the whole step's. An algorithm (`supervised.Supervised`, `grpo.Grpo`,
`sdpo.Sdpo`) is a class over a learner with one method, `step`:

    sums = Sums()
    for rows in learner.batches(prompts, group_size):
        loss, figures = ...                            # sums over the rows
        learner.masters.backward(loss)
        sums.add(loss=loss.detach(), **figures)
    total = learner.summed(sums)                       # over all workers
    optimiser.step(1 / total["counts"], rate)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as distributed

from conrec.config import TrainSettings
from conrec.policy.decoding import DeviceTrie, completion_log_probs, length_batches
from conrec.policy.masters import Masters
from conrec.policy.memory import BATCH_TOKENS
from conrec.policy.optimiser import Optimiser
from conrec.policy.samples import GrpoSamples
from conrec.ragged import Ragged

Figures = dict[str, float]
"""What a step says of itself: a row of metrics.jsonl. `tokens`: those computed by all workers."""


class Sums(dict[str, "torch.Tensor | float"]):
    """Sums by name; a name that is added to for the first time begins at 0."""

    def add(self, **more: torch.Tensor | float) -> None:
        """Adds to each."""
        for name, value in more.items():
            self[name] = self.get(name, 0.0) + value


@dataclass(frozen=True)
class Start:
    """What a stage begins from: the trained tensors by name, and the weight of staying near them."""

    tensors: Mapping[str, torch.Tensor]
    beta: float


class Algorithm(Protocol):
    """A way to train a stage."""

    def step(
        self, samples: GrpoSamples, start: Start, random: np.random.Generator, optimiser: Optimiser, rate: float
    ) -> Figures:
        """One step of all workers on these samples, the same ones and the same random numbers on each of them."""


@dataclass(frozen=True)
class Learner:
    """The model of one worker, the trie that it decodes over, its masters and its memory: `room` positions at once,
    where the settings name no number."""

    model: Any
    trie: DeviceTrie
    masters: Masters
    train: TrainSettings
    room: int = BATCH_TOKENS

    @property
    def tokens_at_once(self) -> int:
        """Positions computed at once, padding included."""
        return self.train.tokens_at_once or self.room

    @property
    def world(self) -> int:
        """How many workers there are."""
        return distributed.get_world_size() if distributed.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return distributed.get_rank() if distributed.is_initialized() else 0

    def mine(self, count: int) -> np.ndarray:
        """This worker's rows of `count`."""
        return np.arange(self.rank, count, self.world)

    def batches(self, prompts: Ragged, completions: int) -> Iterator[np.ndarray]:
        """Rows of each micro-batch, with so many completions a prompt."""
        return length_batches(prompts.lengths, (self.trie.levels - 1) * completions, self.tokens_at_once)

    def columns(self, prompts: Ragged) -> int:
        """Completions of each of these prompts that fit a micro-batch, at least one."""
        room = self.tokens_at_once // len(prompts) - int(prompts.lengths.max())
        return max(1, room // max(1, self.trie.levels - 1))

    def pieces(self, prompts: Ragged, count: int) -> list[slice]:
        """The `count` completions of each prompt, cut to what fits."""
        columns = self.columns(prompts)
        return [slice(start, start + columns) for start in range(0, count, columns)]

    def log_probs(self, prompts: Ragged, leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies of completions. Shape: B prompts, leaves (B, G) -> (B, G, L) each."""
        return completion_log_probs(self.model, prompts, leaves, self.trie)

    def tokens(self, prompts: Ragged, drawn: torch.Tensor) -> torch.Tensor:
        """Tokens of prompts and completions, each once. Shape: drawn (B, G) bool -> ()."""
        return int(prompts.lengths.sum()) + drawn.sum() * self.trie.levels

    def summed(self, sums: Sums) -> Figures:
        """The sums over all workers, which each holds the same names of."""
        # float32: some accelerators have nothing wider, and these are figures to look at.
        values = torch.tensor([float(value) for value in sums.values()], device=self.trie.device)
        if self.world > 1:
            distributed.all_reduce(values)
        return dict(zip(sums, values.tolist(), strict=True))
