"""Batches and loss of the supervised tasks.

Cross-entropy over the whole vocabulary at the target positions only; sequences of like length share a batch, so
that padding stays small. A step's loss is a sum over targets divided by the number of targets of all workers, so
that any number of workers gives the same gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conrec.policy.decoding import decoder_and_head
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged


def batches(examples: Examples, tokens_per_step: int, epochs: float, seed: int) -> list[np.ndarray]:
    """Positions of the examples of each step; a step holds at most `tokens_per_step` tokens, padding included.

    Within an epoch every example comes once, in an order drawn from the seed; a fraction of an epoch is a sample.
    """
    random = np.random.default_rng(seed)
    lengths = examples.tokens.lengths
    steps: list[np.ndarray] = []
    remaining = epochs
    while remaining > 0 and len(lengths):
        rows = random.permutation(len(lengths))[: max(1, round(min(remaining, 1.0) * len(lengths)))]
        # A random tie-break keeps examples of equal length from always meeting in one batch.
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        padded = lengths[rows]
        groups, start = [], 0
        while start < len(rows):
            end = int(np.searchsorted(padded[start:] * np.arange(1, len(rows) - start + 1), tokens_per_step, "right"))
            groups.append(rows[start : start + max(1, end)])
            start += max(1, end)
        steps += [groups[i] for i in random.permutation(len(groups))]
        remaining -= 1
    return steps


def supervised_loss(model: Any, examples: Examples, pad: int = 0) -> tuple[torch.Tensor, int]:
    """(sum of the cross-entropy over the target positions, number of targets).

    Sequences are padded at the end: causal attention never sees the padding of an earlier position.
    """
    device = model.device
    tokens = torch.from_numpy(examples.tokens.padded(pad).astype(np.int64)).to(device)
    target = torch.from_numpy(Ragged(examples.is_target, examples.tokens.offsets).padded(False)).to(device)
    decoder, head = decoder_and_head(model)
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    predicts = target[:, 1:]
    logits = head(hidden[:, :-1][predicts]).float()
    return F.cross_entropy(logits, tokens[:, 1:][predicts], reduction="sum"), int(predicts.sum())
