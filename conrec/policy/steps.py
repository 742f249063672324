"""One step of each objective: what it adds to the gradient, and the sums that its figures are made of.

A step is computed in micro-batches of at most `train.tokens_at_once` positions: rows of like length, whose losses are
sums, so that their gradients add up to the whole step's. The caller divides by counts over all workers.

A GRPO step computes each prompt once for the current policy: the search that draws the completions keeps its graph, and
its log-probabilities are the ones that the loss is taken of (at the first update the ratio to the policy that drew is
1). Where a graph would not fit, a group larger than a micro-batch or layers that are computed again, completions are
drawn without one and computed again as given ones, a piece of the group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from conrec.config import Config
from conrec.policy.decoding import (
    DeviceTrie,
    completion_log_probs,
    length_batches,
    sample_without_replacement,
    traced_samples,
)
from conrec.policy.grpo import advantages, grpo_loss
from conrec.policy.masters import Masters
from conrec.policy.rewards import Rewarder, TargetSet
from conrec.policy.samples import GrpoSamples
from conrec.policy.sdpo import comparable, sdpo_loss
from conrec.policy.supervised import supervised_loss
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged

Sums = dict[str, torch.Tensor | float]
Reference = Mapping[str, torch.Tensor]
"""The trained tensors at the start of the stage."""


@dataclass(frozen=True)
class Rollout:
    """Completions of a micro-batch of prompts, drawn and judged.

    Shape: leaves (B, G); old, reference (B, G, L) log-probabilities when drawn and at the start of the stage; advantage
    (B, G); counts (B, G) bool.
    """

    prompts: Ragged
    leaves: torch.Tensor
    old: torch.Tensor | None
    reference: torch.Tensor
    advantage: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class Steps:
    """The model of one worker and what its steps need beside their data."""

    model: Any
    trie: DeviceTrie
    rewarder: Rewarder
    masters: Masters
    config: Config

    def supervised(self, examples: Examples) -> Sums:
        """Sums of `loss` and `targets` of these examples, after adding the gradient of the loss."""
        sums: Sums = {"loss": 0.0, "targets": 0.0}
        targets = Ragged(examples.is_target, examples.tokens.offsets)
        for rows in self._batches(examples.tokens, 0):
            if targets.take(rows).values.any():
                loss, count = supervised_loss(self.model, examples.take(rows))
                self.masters.backward(loss)
                _add(sums, {"loss": loss.detach(), "targets": count})
        return sums

    def grpo(
        self, samples: GrpoSamples, seeds: np.ndarray, reference: Reference, beta: float
    ) -> tuple[list[Rollout], Sums]:
        """Draws and judges a group for each prompt, and adds the gradient of the first update.

        Shape: seeds (B,) int64, one a prompt.
        """
        rollouts: list[Rollout] = []
        sums: Sums = {}
        settings = self.config.grpo
        for rows in self._batches(samples.prompts, settings.group_size):
            rollout, figures = self._roll_out(samples.take(rows), seeds[rows], reference, beta)
            rollouts.append(rollout)
            _add(sums, figures)
        return rollouts, sums

    def grpo_again(self, rollouts: list[Rollout], beta: float) -> Sums:
        """Adds the gradient of a further update on the same completions."""
        sums: Sums = {}
        for rollout in rollouts:
            _add(sums, self._update(rollout, beta)[0])
        return sums

    def sdpo(self, prompts: Ragged, leaves: torch.Tensor, reference: Reference, beta: float) -> Sums:
        """Compares the first leaf of each prompt with its others. Shape: leaves (B, 1 + D), -1 where there is none."""
        sums: Sums = {}
        for rows in self._batches(prompts, leaves.shape[1]):
            given, own = prompts.take(rows), leaves[torch.as_tensor(rows, device=leaves.device)]
            with torch.no_grad(), self.masters.replaced(reference):
                before, _ = completion_log_probs(self.model, given, own, self.trie)
            log_probs, _ = completion_log_probs(self.model, given, own, self.trie)
            drawn = own >= 0
            loss, margins = sdpo_loss(log_probs, before, drawn, beta)
            self.masters.backward(loss)
            counts, tokens = comparable(drawn).sum(), self._tokens(given, drawn)
            _add(sums, {"loss": loss.detach(), "margins": margins, "counts": counts, "tokens": tokens})
        return sums

    def _roll_out(
        self, samples: GrpoSamples, seeds: np.ndarray, reference: Reference, beta: float
    ) -> tuple[Rollout, Sums]:
        prompts, settings = samples.prompts, self.config.grpo
        traced = not self.config.train.recompute_layers and self._columns(prompts) >= settings.group_size
        if traced:
            leaves, log_probs, entropies = traced_samples(self.model, prompts, self.trie, settings.group_size, seeds)
        else:
            leaves, _ = sample_without_replacement(
                self.model, prompts, self.trie, settings.group_size, seeds, self.config.train.tokens_at_once
            )
        drawn = leaves >= 0
        truth = self._targets(samples.ground_truth, samples.truth_weights)
        positives = self._targets(samples.positives, np.ones(len(samples.positives.values), np.float32))
        reward, gain, harm = self.rewarder(leaves, truth, positives)
        advantage, varied = advantages(reward, drawn, settings)
        with torch.no_grad(), self.masters.replaced(reference):
            before = torch.cat([self._given(prompts, leaves, piece)[0] for piece in self._pieces(prompts, leaves)], 1)
        rollout = Rollout(prompts, leaves, None, before, advantage, drawn & varied[:, None])
        if traced:
            sums = self._learn(rollout, slice(None), log_probs, beta)
            old, entropy = log_probs.detach(), entropies.detach()
        else:
            sums, old, entropy = self._update(rollout, beta)
        figures: Sums = {
            "counts": rollout.counts.sum(),
            "completions": drawn.sum(),
            "reward": (reward * drawn).sum(),
            "reward_gain": (gain * drawn).sum(),
            "reward_penalty": (harm * drawn).sum(),
            "entropy": (entropy * drawn[..., None]).sum(),
            "groups": len(varied),
            "flat": (~varied).sum(),
            "tokens": self._tokens(prompts, drawn),
        }
        return Rollout(prompts, leaves, old, before, advantage, rollout.counts), sums | figures

    def _update(self, rollout: Rollout, beta: float) -> tuple[Sums, torch.Tensor, torch.Tensor]:
        """An update on given completions: sums, their log-probabilities and entropies, detached."""
        sums: Sums = {}
        seen = []
        for piece in self._pieces(rollout.prompts, rollout.leaves):
            log_probs, entropies = self._given(rollout.prompts, rollout.leaves, piece)
            _add(sums, self._learn(rollout, piece, log_probs, beta))
            seen.append((log_probs.detach(), entropies.detach()))
        old, entropy = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        return sums, old, entropy

    def _learn(self, rollout: Rollout, piece: slice, log_probs: torch.Tensor, beta: float) -> Sums:
        old = log_probs.detach() if rollout.old is None else rollout.old[:, piece]
        loss, divergence = grpo_loss(
            log_probs,
            old,
            rollout.reference[:, piece],
            rollout.advantage[:, piece],
            rollout.counts[:, piece],
            beta,
            self.config.grpo,
        )
        self.masters.backward(loss)
        return {"loss": loss.detach(), "kl": divergence}

    def _given(self, prompts: Ragged, leaves: torch.Tensor, piece: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return completion_log_probs(self.model, prompts, leaves[:, piece], self.trie)

    def _batches(self, prompts: Ragged, completions: int) -> Iterator[np.ndarray]:
        """Rows of a micro-batch, with so many completions a prompt."""
        return length_batches(prompts.lengths, (self.trie.levels - 1) * completions, self.config.train.tokens_at_once)

    def _columns(self, prompts: Ragged) -> int:
        """Completions of each of these prompts that fit a micro-batch, at least one."""
        room = self.config.train.tokens_at_once // len(prompts) - int(prompts.lengths.max())
        return max(1, room // max(1, self.trie.levels - 1))

    def _pieces(self, prompts: Ragged, leaves: torch.Tensor) -> list[slice]:
        columns = self._columns(prompts)
        return [slice(start, start + columns) for start in range(0, leaves.shape[1], columns)]

    def _tokens(self, prompts: Ragged, drawn: torch.Tensor) -> torch.Tensor:
        return int(prompts.lengths.sum()) + drawn.sum() * self.trie.levels

    def _targets(self, ragged: Ragged, weights: np.ndarray) -> TargetSet:
        device = self.trie.device
        return TargetSet(
            torch.from_numpy(ragged.padded(-1).astype(np.int64)).to(device),
            torch.from_numpy(Ragged(weights, ragged.offsets).padded(0)).to(device),
        )


def _add(sums: Sums, more: Sums) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value
