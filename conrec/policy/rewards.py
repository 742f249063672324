"""What a generated semantic ID is worth.

    r(o) = max_{i in GTS} w_i sim(o, i) - gamma max_{j in future_positives} sim(o, j)        (arXiv 2601.15721)

sim is the cosine of reconstructed embeddings; the variants replace it by a function of the two semantic IDs:

- similarity  the cosine itself, as published;
- sharpened   exp((cosine - 1) / 0.15): only close items count;
- threshold   the cosine where it is at least 0.6, else 0;
- prefix      1 for a match of all codes, .1 of all but the last, .01 of all but the last two, and so on down to the
              first code alone; 0 where that differs: the prefix-hit ladder;
- marginal    the same ladder, but a target pays only the share of the group that found it: every completion is
              paid for what it adds to its group's hits, so the served set is rewarded for coverage.

Rewards are computed for the ragged targets of all groups at once: no loop over prompts or completions.

    reward, gain, harm = Rewarder(vectors, codes, "prefix", gamma=0.5)(leaves, ground_truth, positives)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHARPNESS = 0.15
THRESHOLD = 0.6
LADDER = 0.1


@dataclass(frozen=True)
class TargetSet:
    """Ragged targets of B prompts, padded. Shape: leaves (B, T) int64 (-1: none), weights (B, T) float32."""

    leaves: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Rewarder:
    """Scores completions against targets.

    Shape: vectors (M, D) unit vectors of all leaves, codes (M, L) their semantic IDs.
    """

    vectors: torch.Tensor
    codes: torch.Tensor
    kind: str
    gamma: float

    def __call__(
        self, completions: torch.Tensor, ground_truth: TargetSet, positives: TargetSet
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(reward, first term, penalty before gamma), each (B, G), for completions (B, G) of leaves (-1: none)."""
        gain = self._best(completions, ground_truth)
        harm = self._best(completions, positives)
        return gain - self.gamma * harm, gain, harm

    def _best(self, completions: torch.Tensor, targets: TargetSet) -> torch.Tensor:
        if not targets.leaves.shape[1]:
            return torch.zeros(completions.shape, device=completions.device)
        affinity = self.affinity(completions, targets.leaves) * targets.weights[:, None, :]
        valid = (targets.leaves[:, None, :] >= 0) & (completions[:, :, None] >= 0)
        # Where a prompt has no target of this sort the term is 0, not the smallest cosine.
        affinity = affinity.masked_fill(~valid, -torch.inf)
        if self.kind == "marginal":
            # A full match is unique in a group of distinct completions; a shared prefix is shared among its finders.
            finders = (affinity > 0).sum(1, keepdim=True).clamp(min=1)
            affinity = torch.where(affinity >= targets.weights[:, None, :], affinity, affinity / finders)
        best = affinity.amax(-1)
        return torch.where(torch.isinf(best), 0.0, best)

    def affinity(self, completions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """sim of each completion with each target of its prompt. Shape: (B, G), (B, T) -> (B, G, T)."""
        completions, targets = completions.clamp(min=0), targets.clamp(min=0)
        if self.kind in ("prefix", "marginal"):
            same = self.codes[completions][:, :, None, :] == self.codes[targets][:, None, :, :]
            matched = same.long().cumprod(-1).sum(-1)
            return torch.where(matched > 0, LADDER ** (self.codes.shape[1] - matched).float(), 0.0)
        cosine = torch.einsum("bgd,btd->bgt", self.vectors[completions], self.vectors[targets])
        if self.kind == "sharpened":
            return torch.exp((cosine - 1) / SHARPNESS)
        if self.kind == "threshold":
            return torch.where(cosine >= THRESHOLD, cosine, 0.0)
        return cosine
