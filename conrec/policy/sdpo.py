"""S-DPO: softmax direct preference optimisation over semantic IDs (arXiv 2406.09215), the offline rival of GRPO.

    L = -log sigmoid(-log sum_{d in compared} exp(beta [(log pi - log pi_ref)(d) - (log pi - log pi_ref)(chosen)]))

Here the chosen completion is what the user rejected in the following days, and it is compared with what users liked:
nothing is generated during training. A completion's log pi is the sum over its tokens of log-probabilities
renormalised over the children that the trie allows.

    Sdpo(learner, config.grpo).step(samples, Start(reference, beta), random, optimiser, rate)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from conrec.config import GrpoSettings
from conrec.policy.learner import Figures, Learner, Start, Sums
from conrec.policy.optimiser import Optimiser
from conrec.policy.samples import GrpoSamples
from conrec.ragged import Ragged, pairs, places

MOST_COMPARED = 8
"""Liked completions that one chosen completion is compared with at most."""


@dataclass(frozen=True)
class Compared:
    """What the loss is taken of beside the log-probabilities of the policy: for each of B prompts, a chosen completion
    and D others of L codes.

    Shape: reference (B, 1 + D, L) log-probabilities at the start of the stage, the chosen completion first; drawn
    (B, 1 + D) bool, which of them there are.
    """

    reference: torch.Tensor
    drawn: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """Which samples have both sides of a comparison. Shape: (B,) bool."""
        return self.drawn[:, 0] & self.drawn[:, 1:].any(1)


@dataclass(frozen=True)
class Sdpo:
    """One step: choose, compare, learn."""

    learner: Learner
    settings: GrpoSettings

    def step(
        self, samples: GrpoSamples, start: Start, random: np.random.Generator, optimiser: Optimiser, rate: float
    ) -> Figures:
        """One step of all workers on these samples."""
        # Drawn for the whole step by every worker: the likes lent between samples know no workers.
        leaves = draw_comparisons(samples, min(self.settings.group_size - 1, MOST_COMPARED), random)
        mine = self.learner.mine(len(leaves))
        self.learner.masters.clear()
        own = torch.from_numpy(leaves[mine]).to(self.learner.trie.device)
        sums = self._gradient(samples.prompts.take(mine), own, start)
        sums.add(samples=len(mine))
        total = self.learner.summed(sums)
        counted = max(total["counts"], 1)
        optimiser.step(1 / counted, rate)
        return {
            "loss": total["loss"] / counted,
            "margin": total["margins"] / counted,
            "samples_without_comparison": 1 - total["counts"] / total["samples"],
            "tokens": total["tokens"],
        }

    def _gradient(self, prompts: Ragged, leaves: torch.Tensor, start: Start) -> Sums:
        """Adds the gradient of these comparisons. Shape: leaves (B, 1 + D), the chosen first, -1 for none."""
        learner, sums = self.learner, Sums()
        for rows in learner.batches(prompts, leaves.shape[1]):
            given, own = prompts.take(rows), leaves[torch.as_tensor(rows, device=leaves.device)]
            with torch.no_grad(), learner.masters.replaced(start.tensors):
                reference, _ = learner.log_probs(given, own)
            compared = Compared(reference, own >= 0)
            loss, margins = sdpo_loss(learner.log_probs(given, own)[0], compared, start.beta)
            learner.masters.backward(loss)
            tokens = learner.tokens(given, compared.drawn)
            sums.add(loss=loss.detach(), margins=margins, counts=compared.counts.sum(), tokens=tokens)
        return sums


def sdpo_loss(log_probs: torch.Tensor, compared: Compared, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of L over the samples that count, sum of their margins, detached).

    A sample counts when it has a chosen completion and one to compare it with. Its margin is how much more
    log-probability the chosen one gained since the start of the stage than the best of the others.
    Shape: log_probs (B, 1 + D, L), per token, of the policy that learns.
    """
    counts, others = compared.counts, compared.drawn[:, 1:]
    gained = (log_probs - compared.reference).sum(-1)
    # -log sigmoid(-log x) = log(1 + x): the cross-entropy of the chosen one among all, its own term being the 1.
    apart = torch.where(others, gained[:, 1:] - gained[:, :1], -torch.inf)
    own = torch.zeros_like(gained[:, :1])
    loss = torch.cat([own, torch.where(others, beta * apart, -torch.inf)], 1).logsumexp(1)
    margins = torch.where(counts, -apart.amax(1), 0.0)
    return torch.where(counts, loss, 0.0).sum(), margins.sum().detach()


def draw_comparisons(samples: GrpoSamples, count: int, random: np.random.Generator) -> np.ndarray:
    """The chosen leaf of each sample and up to `count` distinct others, -1 where there is none.

    Chosen: one of the observed future negatives (weight 1, as no neighbour has), each as likely. Others: the anchor's
    own future likes; for an anchor that likes nothing, likes of the other samples, each leaf as likely, without the
    anchor's ground truth, which it may well dislike. A leaf that the anchor both rejects and likes says nothing and is
    no like.
    Shape: S samples -> (S, 1 + count) int64.
    """
    size = len(samples.prompts)
    leaves = np.full((size, 1 + count), -1, np.int64)
    truth = samples.ground_truth
    observed = samples.truth_weights == 1
    negatives = Ragged.from_rows(truth.rows[observed], truth.values[observed], size)
    has_negative = negatives.lengths > 0
    place = negatives.offsets[:-1] + random.integers(0, np.maximum(negatives.lengths, 1))
    leaves[has_negative, 0] = negatives.values[place[has_negative]]

    width = int(max(truth.values.max(initial=0), samples.positives.values.max(initial=0))) + 1
    rejected, likes, known = (pairs(part.rows, part.values, width) for part in (negatives, samples.positives, truth))
    rows, liked = np.divmod(np.setdiff1d(likes, rejected), width)
    without = np.flatnonzero(np.bincount(rows, minlength=size) == 0)
    pool = np.unique(samples.positives.values).astype(np.int64)
    lent = np.divmod(np.setdiff1d(pairs(without[:, None], pool, width), known), width)
    rows, liked = np.concatenate([rows, lent[0]]), np.concatenate([liked, lent[1]])
    order = np.lexsort((random.random(len(rows)), rows))
    rows, liked = rows[order], liked[order]
    nth = places(np.bincount(rows))
    kept = nth < count
    leaves[rows[kept], 1 + nth[kept]] = liked[kept]
    return leaves
