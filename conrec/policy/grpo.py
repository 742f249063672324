"""Group Relative Policy Optimisation over constrained semantic IDs: the formulas, without a training framework.

    A_i = (r_i - mean(r)) [/ max(std(r), floor)]
    J   = mean_i min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i) - beta KL
    KL  = exp(d) - d - 1,   d = log pi_ref - log pi

(arXiv 2402.03300; the clipping with two bounds: arXiv 2503.14476). Here rho_i is the ratio of whole completions: three
or four tokens, drawn together without replacement. All log-probabilities are renormalised over the children that the
trie allows. Left out of the textbook: no value function, no entropy bonus, no length normalisation (all completions
have the same length).
"""

from __future__ import annotations

import torch

from conrec.config import GrpoSettings


def advantages(rewards: torch.Tensor, drawn: torch.Tensor, settings: GrpoSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages (B, G) and which groups count (B,).

    Groups whose rewards lie within `min_reward_range` teach nothing and are skipped. Shape: rewards (B, G), drawn
    (B, G) bool: a trie smaller than the group leaves places empty.
    """
    count = drawn.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(drawn, rewards - (rewards * drawn).sum(1, keepdim=True) / count, 0.0)
    if settings.normalise_std:
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        scaled = centred / deviation.clamp(min=settings.std_floor)
    else:
        scaled = centred
    highest = rewards.masked_fill(~drawn, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~drawn, torch.inf).amin(1)
    return scaled, highest - lowest > settings.min_reward_range


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    advantage: torch.Tensor,
    counts: torch.Tensor,
    beta: float,
    settings: GrpoSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of -J over the completions that count, sum of their KL, detached).

    Shape: log-probabilities (B, G, L) per token, advantage (B, G), counts (B, G) bool.
    """
    ratio = (log_probs.sum(-1) - old_log_probs.sum(-1)).exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    difference = reference_log_probs - log_probs
    divergence = (difference.exp() - difference - 1).sum(-1)
    loss = torch.where(counts, beta * divergence - surrogate, 0.0).sum()
    return loss, torch.where(counts, divergence, 0.0).sum().detach()
