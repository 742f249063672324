"""Group Relative Policy Optimisation over constrained semantic IDs (arXiv 2402.03300): the formulas, and a step of it.

    A_i = (r_i - mean(r)) / max(std(r), floor)
    J   = mean_i rho_i A_i - beta KL,   rho_i = pi / pi_drawn
    KL  = sum over the tokens of exp(d) - d - 1,   d = log pi_ref - log pi

What departs from the textbook:

- A group is drawn **without replacement**, so its completions are distinct and differ in reward. Each then counts the
  same, whatever its probability: rewards are centred on the mean of the distinct ones, not on what the policy expects,
  and improbable completions weigh more in J and in KL than plain draws would.
- **One update a rollout**: the policy that learns is the one that drew, rho is 1 and only its gradient counts. So there
  is no clipping and no trust region but the KL.
- All log-probabilities are renormalised over the children that the trie allows, in the draw, in J and in KL alike.
- The ratio is that of a whole completion, three or four tokens. All have the same length: no normalisation by it.
- The standard deviation has a floor, and groups whose rewards lie within `min_reward_range` are left out; the mean is
  over the completions of all other groups of the step.
- The reference is the policy at the start of the stage, not at the start of training.
- No value function and no entropy bonus, as in the original.

    Grpo(learner, rewarder, config.grpo).step(samples, Start(reference, beta), random, optimiser, rate)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as distributed

from conrec.config import GrpoSettings
from conrec.policy.decoding import sample_without_replacement, traced_samples
from conrec.policy.learner import Figures, Learner, Start, Sums
from conrec.policy.optimiser import Optimiser
from conrec.policy.rewards import Rewarder, TargetSet
from conrec.policy.samples import GrpoSamples
from conrec.ragged import Ragged


@dataclass(frozen=True)
class Group:
    """What the loss is taken of, beside the log-probabilities of the policy: G completions of L codes for B prompts.

    Shape: reference (B, G, L) log-probabilities at the start of the stage; advantage (B, G); counts (B, G) bool.
    """

    reference: torch.Tensor
    advantage: torch.Tensor
    counts: torch.Tensor

    def piece(self, columns: slice) -> Group:
        """Some of each prompt's completions."""
        return Group(self.reference[:, columns], self.advantage[:, columns], self.counts[:, columns])


@dataclass(frozen=True)
class Grpo:
    """One step: draw, reward, learn. Each prompt is computed once for the current policy, whatever its group's size.

    The search that draws keeps its graph, and its log-probabilities are the ones that the loss is taken of. Where a
    graph would not fit, a group larger than a micro-batch or layers that are computed again, completions are drawn
    without one and computed again as given ones, a piece of the group at a time.
    """

    learner: Learner
    rewarder: Rewarder
    settings: GrpoSettings

    def step(
        self, samples: GrpoSamples, start: Start, random: np.random.Generator, optimiser: Optimiser, rate: float
    ) -> Figures:
        """One step of all workers on these samples."""
        learner, count = self.learner, len(samples.prompts)
        # Drawn for the whole step by every worker: which completions a prompt gets does not tell their number.
        seeds = random.integers(1 << 62, size=count)
        mine = learner.mine(count)
        learner.masters.clear()
        sums, generated = self._gradient(samples.take(mine), seeds[mine], start)
        total = learner.summed(sums)
        counted = max(total["counts"], 1)
        optimiser.step(1 / counted, rate)
        if learner.world > 1:
            distributed.all_reduce(generated)
        means = ("reward", "reward_gain", "reward_penalty", "entropy")
        return {
            "loss": total["loss"] / counted,
            "kl": total["kl"] / counted,
            **{name: total[name] / max(total["completions"], 1) for name in means},
            "groups_without_variance": total["flat"] / total["groups"],
            # Share of the groups that hold it: a reward farmed by one hub shows here first.
            "most_frequent_share": float(generated.max()) / total["groups"],
            "tokens": total["tokens"],
        }

    def _gradient(self, samples: GrpoSamples, seeds: np.ndarray, start: Start) -> tuple[Sums, torch.Tensor]:
        """Adds the gradient of these samples; sums, and how often each leaf was drawn.

        Shape: seeds (B,) int64, one a prompt; returns counts (M,) int64.
        """
        sums = Sums()
        generated = torch.zeros(len(self.rewarder.codes), dtype=torch.int64, device=self.learner.trie.device)
        for rows in self.learner.batches(samples.prompts, self.settings.group_size):
            leaves, figures = self._micro_batch(samples.take(rows), seeds[rows], start)
            generated += torch.bincount(leaves[leaves >= 0], minlength=len(generated))
            sums.add(**figures)
        return sums, generated

    def _micro_batch(self, samples: GrpoSamples, seeds: np.ndarray, start: Start) -> tuple[torch.Tensor, Sums]:
        """The leaves (B, G) that were drawn for a micro-batch, -1 where there are none, and its sums."""
        learner, prompts, size = self.learner, samples.prompts, self.settings.group_size
        # 1. Draw.
        traced = not learner.train.recompute_layers and learner.columns(prompts) >= size
        if traced:
            leaves, log_probs, entropies = traced_samples(learner.model, prompts, learner.trie, size, seeds)
        else:
            budget = learner.tokens_at_once
            leaves, _ = sample_without_replacement(learner.model, prompts, learner.trie, size, seeds, budget)
        drawn, pieces = leaves >= 0, learner.pieces(prompts, leaves.shape[1])
        # 2. Reward.
        truth = self._targets(samples.ground_truth, samples.truth_weights)
        positives = self._targets(samples.positives, np.ones(len(samples.positives.values), np.float32))
        reward, gain, harm = self.rewarder(leaves, truth, positives)
        advantage, varied = advantages(reward, drawn, self.settings)
        # 3. Learn.
        with torch.no_grad(), learner.masters.replaced(start.tensors):
            reference = torch.cat([learner.log_probs(prompts, leaves[:, piece])[0] for piece in pieces], 1)
        group, sums = Group(reference, advantage, drawn & varied[:, None]), Sums()
        for piece in [slice(None)] if traced else pieces:
            if not traced:
                log_probs, entropies = learner.log_probs(prompts, leaves[:, piece])
            loss, divergence = grpo_loss(log_probs, group.piece(piece), start.beta)
            learner.masters.backward(loss)
            entropy = (entropies.detach() * drawn[:, piece, None]).sum()
            sums.add(loss=loss.detach(), kl=divergence, entropy=entropy)
        sums.add(
            counts=group.counts.sum(),
            completions=drawn.sum(),
            reward=(reward * drawn).sum(),
            reward_gain=(gain * drawn).sum(),
            reward_penalty=(harm * drawn).sum(),
            groups=len(varied),
            flat=(~varied).sum(),
            tokens=learner.tokens(prompts, drawn),
        )
        return leaves, sums

    def _targets(self, ragged: Ragged, weights: np.ndarray) -> TargetSet:
        device = self.learner.trie.device
        return TargetSet(
            torch.from_numpy(ragged.padded(-1).astype(np.int64)).to(device),
            torch.from_numpy(Ragged(weights, ragged.offsets).padded(0)).to(device),
        )


def advantages(rewards: torch.Tensor, drawn: torch.Tensor, settings: GrpoSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (B, G) and which groups count (B,).

    Groups whose rewards lie within `min_reward_range` teach nothing and are skipped. Shape: rewards (B, G), drawn
    (B, G) bool: a trie smaller than the group leaves places empty.
    """
    count = drawn.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(drawn, rewards - (rewards * drawn).sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    highest = rewards.masked_fill(~drawn, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~drawn, torch.inf).amin(1)
    return centred / deviation.clamp(min=settings.std_floor), highest - lowest > settings.min_reward_range


def grpo_loss(log_probs: torch.Tensor, group: Group, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -J over the completions that count, sum of their KL, detached).

    Shape: log_probs (B, G, L), per token, of the policy that drew and that learns.
    """
    total = log_probs.sum(-1)
    ratio = (total - total.detach()).exp()
    difference = group.reference - log_probs
    divergence = (difference.exp() - difference - 1).sum(-1)
    loss = torch.where(group.counts, beta * divergence - ratio * group.advantage, 0.0).sum()
    return loss, torch.where(group.counts, divergence, 0.0).sum().detach()
