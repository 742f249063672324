"""S-DPO: softmax direct preference optimisation over semantic IDs (arXiv 2406.09215), the offline rival of GRPO.

    L = -log sigmoid(-log sum_{d in compared} exp(beta [(log pi - log pi_ref)(d) - (log pi - log pi_ref)(chosen)]))

Here the chosen completion is what the user rejected in the following days, and it is compared with what users liked:
nothing is generated during training. A completion's log pi is the sum over its tokens of log-probabilities
renormalised over the children that the trie allows.
"""

from __future__ import annotations

import numpy as np
import torch

from conrec.policy.samples import GrpoSamples
from conrec.ragged import Ragged, pairs, places

MOST_COMPARED = 8
"""Liked completions that one chosen completion is compared with at most."""


def sdpo_loss(
    log_probs: torch.Tensor, reference_log_probs: torch.Tensor, drawn: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of L over the samples that count, sum of their margins, detached).

    A sample counts when it has a chosen completion and one to compare it with. Its margin is how much more
    log-probability the chosen one gained since the reference than the best of the others.
    Shape: log-probabilities (B, 1 + D, L) per token, the chosen completion first; drawn (B, 1 + D) bool.
    """
    counts = comparable(drawn)
    gained = (log_probs - reference_log_probs).sum(-1)
    # -log sigmoid(-log x) = log(1 + x): the cross-entropy of the chosen one among all, its own term being the 1.
    apart = torch.where(drawn[:, 1:], gained[:, 1:] - gained[:, :1], -torch.inf)
    own = torch.zeros_like(gained[:, :1])
    loss = torch.cat([own, torch.where(drawn[:, 1:], beta * apart, -torch.inf)], 1).logsumexp(1)
    margins = torch.where(counts, -apart.amax(1), 0.0)
    return torch.where(counts, loss, 0.0).sum(), margins.sum().detach()


def comparable(drawn: torch.Tensor) -> torch.Tensor:
    """Which samples have both sides of a comparison. Shape: (B, 1 + D) bool -> (B,) bool."""
    return drawn[:, 0] & drawn[:, 1:].any(1)


def draw_comparisons(samples: GrpoSamples, count: int, random: np.random.Generator) -> np.ndarray:
    """The chosen leaf of each sample and up to `count` distinct others, -1 where there is none.

    Chosen: one of the observed future negatives (weight 1), each as likely. Others: the anchor's own future likes;
    for an anchor that likes nothing, likes of the other samples, each leaf as likely, without the anchor's ground
    truth, which it may well dislike. A leaf that the anchor both rejects and likes says nothing and is no like.
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
