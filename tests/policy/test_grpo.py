"""The objective against its formula, written out with Python numbers."""

import math

import pytest
import torch

from conrec.config import GrpoSettings
from conrec.policy.grpo import advantages, grpo_loss

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_advantages_are_centred_and_divided_by_at_least_the_floor():
    settings = GrpoSettings(std_floor=0.05)
    scaled, counts = advantages(torch.tensor([[0.0, 0.0, 3.0]]), ALL, settings)
    assert scaled[0].tolist() == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)])
    assert counts.tolist() == [True]
    scaled, _ = advantages(torch.tensor([[0.0, 0.0, 0.003]]), ALL, settings)
    assert scaled[0].tolist() == pytest.approx([-0.02, -0.02, 0.04])


def test_groups_without_variance_and_empty_places_do_not_count():
    settings = GrpoSettings(normalise_std=False)
    _, counts = advantages(torch.full((1, 3), 0.5), ALL, settings)
    assert counts.tolist() == [False]
    drawn = torch.tensor([[True, True, False]])
    scaled, counts = advantages(torch.tensor([[1.0, 0.0, 99.0]]), drawn, settings)
    assert scaled[0].tolist() == [0.5, -0.5, 0.0]
    assert counts.tolist() == [True]


def plain_loss(new, old, reference, advantage, beta, low, high):
    """One completion, from the formula."""
    ratio = math.exp(sum(new) - sum(old))
    clipped = min(max(ratio, 1 - low), 1 + high)
    divergence = sum(math.exp(r - n) - (r - n) - 1 for n, r in zip(new, reference, strict=True))
    return -(min(ratio * advantage, clipped * advantage) - beta * divergence)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_loss_is_the_formula(advantage, shift):
    settings = GrpoSettings(clip_low=0.2, clip_high=0.28)
    new, reference = [-1.0 + shift, -2.0], [-1.2, -1.7]
    old = [-1.0, -2.0]
    tensors = [torch.tensor([[row]]) for row in (new, old, reference)]
    counts = torch.ones(1, 1, dtype=torch.bool)
    loss, divergence = grpo_loss(*tensors, torch.tensor([[advantage]]), counts, 0.3, settings)
    assert loss.item() == pytest.approx(plain_loss(new, old, reference, advantage, 0.3, 0.2, 0.28), rel=1e-5)
    assert divergence.item() >= 0


def test_skipped_completions_have_no_gradient():
    new = torch.zeros(1, 2, 2, requires_grad=True)
    zeros = torch.zeros(1, 2, 2)
    loss, _ = grpo_loss(new, zeros, zeros - 1, torch.ones(1, 2), torch.tensor([[True, False]]), 0.1, GrpoSettings())
    loss.backward()
    assert new.grad[0, 0].abs().min() > 0
    assert new.grad[0, 1].abs().max() == 0
