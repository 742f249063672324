"""The objective against its formula, written out with Python numbers."""

import math

import pytest
import torch

from conrec.config import GrpoSettings
from conrec.policy.grpo import Group, advantages, grpo_loss

ALL = torch.ones(1, 3, dtype=torch.bool)


def test_advantages_are_centred_and_divided_by_at_least_the_floor():
    settings = GrpoSettings(std_floor=0.05)
    scaled, counts = advantages(torch.tensor([[0.0, 0.0, 3.0]]), ALL, settings)
    assert scaled[0].tolist() == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)])
    assert counts.tolist() == [True]
    scaled, _ = advantages(torch.tensor([[0.0, 0.0, 0.003]]), ALL, settings)
    assert scaled[0].tolist() == pytest.approx([-0.02, -0.02, 0.04])


def test_groups_without_variance_and_empty_places_do_not_count():
    settings = GrpoSettings(std_floor=1.0)
    _, counts = advantages(torch.full((1, 3), 0.5), ALL, settings)
    assert counts.tolist() == [False]
    drawn = torch.tensor([[True, True, False]])
    scaled, counts = advantages(torch.tensor([[1.0, 0.0, 99.0]]), drawn, settings)
    assert scaled[0].tolist() == [0.5, -0.5, 0.0]
    assert counts.tolist() == [True]


def plain_loss(new, reference, advantage, beta):
    """One completion, from the formula: the policy that learns is the one that drew, and their ratio is 1."""
    divergence = sum(math.exp(r - n) - (r - n) - 1 for n, r in zip(new, reference, strict=True))
    return -(advantage - beta * divergence)


def group_of(reference, advantage):
    advantage = torch.tensor([[advantage]])
    return Group(torch.tensor([[reference]]), advantage, torch.ones_like(advantage, dtype=torch.bool))


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_loss_is_the_formula(advantage):
    new, reference = [-1.0, -2.0], [-1.2, -1.7]
    loss, divergence = grpo_loss(torch.tensor([[new]]), group_of(reference, advantage), 0.3)
    assert loss.item() == pytest.approx(plain_loss(new, reference, advantage, 0.3), rel=1e-5)
    assert divergence.item() >= 0


@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_the_gradient_is_that_of_the_textbook_at_a_ratio_of_1(advantage):
    """Of min(rho A, clip(rho) A) with rho = pi / pi_drawn, by finite differences around the policy that drew."""
    drawn, reference, step = [-1.0, -2.0], [-1.2, -1.7], 1e-5

    def textbook(first):
        ratio = math.exp(first - drawn[0])
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        divergence = sum(math.exp(r - n) - (r - n) - 1 for n, r in zip([first, drawn[1]], reference, strict=True))
        return 0.3 * divergence - surrogate

    new = torch.tensor([[drawn]], requires_grad=True)
    grpo_loss(new, group_of(reference, advantage), 0.3)[0].backward()
    expected = (textbook(drawn[0] + step) - textbook(drawn[0] - step)) / (2 * step)
    assert new.grad[0, 0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_skipped_completions_have_no_gradient():
    new = torch.zeros(1, 2, 2, requires_grad=True)
    group = Group(torch.full((1, 2, 2), -1.0), torch.ones(1, 2), torch.tensor([[True, False]]))
    grpo_loss(new, group, 0.1)[0].backward()
    assert new.grad[0, 0].abs().min() > 0
    assert new.grad[0, 1].abs().max() == 0
