"""The supervised tasks: their batches, their loss, and a step of it.

    for rows in batches(examples, tokens_per_step, epochs, seed):
        Supervised(learner).step(examples.take(rows), optimiser, rate)

Cross-entropy over the whole vocabulary at the target positions only, and a block of them at a time: logits and their
gradient never exist for a whole batch (4 + 4 bytes a position and entry of the vocabulary). Sequences of like length
share a batch, so that padding stays small. A step's loss is a sum over targets divided by the number of targets of all
workers, so that any number of workers gives the same gradient, but for its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from conrec.policy.head import decoder_and_head
from conrec.policy.learner import Figures, Learner, Sums
from conrec.policy.memory import LOSS_POSITIONS
from conrec.policy.model import trainable
from conrec.policy.optimiser import Optimiser
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
            # Lengths ascend, so no group holds more rows than fit at the length of its first.
            most = tokens_per_step // max(int(padded[start]), 1) + 1
            following = padded[start : start + most]
            end = int(np.searchsorted(following * np.arange(1, len(following) + 1), tokens_per_step, "right"))
            groups.append(rows[start : start + max(1, end)])
            start += max(1, end)
        steps += [groups[i] for i in random.permutation(len(groups))]
        remaining -= 1
    return steps


@dataclass(frozen=True)
class Supervised:
    """One step: the cross-entropy of the targets."""

    learner: Learner

    def step(self, examples: Examples, optimiser: Optimiser, rate: float) -> Figures:
        """One step of all workers on these examples, the same ones on each of them."""
        mine = examples.take(self.learner.mine(len(examples.tokens)))
        self.learner.masters.clear()
        sums = self._gradient(mine)
        sums.add(tokens=len(mine.tokens.values))
        total = self.learner.summed(sums)
        count = max(total["targets"], 1)
        optimiser.step(1 / count, rate)
        return {"loss": total["loss"] / count, "tokens": total["tokens"]}

    def _gradient(self, examples: Examples) -> Sums:
        """Adds the gradient of these examples."""
        sums = Sums(loss=0.0, targets=0.0)
        targets = Ragged(examples.is_target, examples.tokens.offsets)
        for rows in self.learner.batches(examples.tokens, 0):
            if targets.take(rows).values.any():
                loss, count = supervised_loss(self.learner.model, examples.take(rows))
                self.learner.masters.backward(loss)
                sums.add(loss=loss.detach(), targets=count)
        return sums


def supervised_loss(
    model: Any, examples: Examples, pad: int = 0, block: int = LOSS_POSITIONS
) -> tuple[torch.Tensor, int]:
    """(sum of the cross-entropy over the target positions, number of targets).

    Sequences are padded at the end: causal attention never sees the padding of an earlier position.
    """
    device = model.device
    tokens = torch.from_numpy(examples.tokens.padded(pad).astype(np.int64)).to(device)
    target = torch.from_numpy(Ragged(examples.is_target, examples.tokens.offsets).padded(False)).to(device)
    decoder, head = decoder_and_head(model)
    hidden = decoder(input_ids=tokens, use_cache=False).last_hidden_state
    predicts = target[:, 1:]
    answers = tokens[:, 1:][predicts]
    hidden = hidden[:, :-1][predicts]
    weights = trainable(model).values() if torch.is_grad_enabled() else ()
    return _BlockedCrossEntropy.apply(head, block, answers, hidden, *weights), len(answers)


class _BlockedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of a head, with the gradient of each block taken while its logits exist.

    So no logits are kept for the backward pass, nor computed twice. Which tensors a head depends on is asked of
    autograd, whatever adapters wrap it: all trained ones are given, and those that it does not touch get no gradient.
    Shape: targets (N,), hidden (N, H) -> () float32.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Any, block: int, targets: torch.Tensor, hidden: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum; gradients of it are kept beside."""
        total = torch.zeros((), device=hidden.device)
        by_hidden = torch.zeros_like(hidden)
        by_weights: list[torch.Tensor | None] = [None] * len(weights)
        for start in range(0, len(targets), block):
            place = slice(start, start + block)
            given = hidden[place].detach().requires_grad_(ctx.needs_input_grad[3])
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                loss = F.cross_entropy(head(given).float(), targets[place], reduction="sum")
            total += loss.detach()
            if not any(ctx.needs_input_grad):
                continue
            inputs = [given, *weights] if ctx.needs_input_grad[3] else list(weights)
            gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True))
            if ctx.needs_input_grad[3]:
                by_hidden[place] = gradients.pop(0)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    held = by_weights[number]
                    by_weights[number] = gradient.float() if held is None else held.add_(gradient)
        ctx.save_for_backward(by_hidden, *by_weights)
        ctx.dtypes = [weight.dtype for weight in weights]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradients that `forward` kept, times that of the sum."""
        by_hidden, *by_weights = ctx.saved_tensors
        scaled = (
            None if gradient is None else (outer[0] * gradient).to(dtype)
            for gradient, dtype in zip(by_weights, ctx.dtypes, strict=True)
        )
        return None, None, None, (outer[0] * by_hidden).to(by_hidden.dtype), *scaled
