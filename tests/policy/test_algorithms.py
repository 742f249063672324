"""A step in micro-batches of any size, on any number of workers and with layers computed again is the whole step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import CODES, KINDS, SEMANTIC_IDS, TRIE, leaves_of, tiny_config, tiny_model

from conrec.config import GrpoSettings
from conrec.errors import ConfigError
from conrec.policy.decoding import DeviceTrie, completion_log_probs, sample_without_replacement
from conrec.policy.grpo import Group, Grpo, advantages, grpo_loss
from conrec.policy.learner import Learner, Start
from conrec.policy.masters import Masters
from conrec.policy.model import recompute_layers, trainable
from conrec.policy.optimiser import LARGEST_NORM, Optimiser
from conrec.policy.rewards import Rewarder
from conrec.policy.samples import GrpoSamples
from conrec.policy.sdpo import Compared, Sdpo, sdpo_loss
from conrec.policy.supervised import Supervised
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged

GROUP, BETA, PROMPTS = 4, 0.3, 9
SEEDS = np.random.default_rng(1).integers(1 << 62, size=PROMPTS)
WHOLE = 100_000
BUDGETS = [WHOLE, 120, 40, 1]
"""Everything at once; some prompts with their groups; pieces of a group; one completion at a time."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


SETTINGS = GrpoSettings(group_size=GROUP, min_reward_range=0.0, std_floor=1.0)
REWARDER = Rewarder(torch.eye(len(SEMANTIC_IDS)), torch.from_numpy(TRIE.semantic_ids), "prefix", 0.5)


def learner_of(budget: int = WHOLE, recompute: bool = False) -> tuple[Learner, Start]:
    """A model that has left the start of its stage, and that start."""
    train = {"tokens_at_once": budget, "recompute_layers": recompute}
    config = tiny_config(train=train, model={"attention_dropout": 0})
    model, _, vocabulary = tiny_model(config)
    model.eval()
    if recompute:
        recompute_layers(model)
    start = {name: value.detach().clone() for name, value in trainable(model).items()}
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in trainable(model).values():
            value += 0.05 * torch.randn(value.shape, generator=random).to(value.dtype)
    masters = Masters(trainable(model), {})
    return Learner(model, DeviceTrie(TRIE, vocabulary), masters, config.train), Start(start, BETA)


def grpo_of(learner: Learner) -> Grpo:
    return Grpo(learner, REWARDER, SETTINGS)


def prompts_of_any_length(learner: Learner) -> Ragged:
    lengths = np.array([3, 17, 9, 9, 30, 1, 12, 17, 5])
    tokens = np.random.default_rng(0).integers(2, learner.model.config.vocab_size, lengths.sum())
    return Ragged.from_lengths(tokens.astype(np.int32), lengths)


def samples_of(learner: Learner) -> GrpoSamples:
    kinds, one = np.arange(PROMPTS) % KINDS, np.ones(PROMPTS, np.int64)
    truth = Ragged.from_lengths(np.stack([leaves_of(kinds, code) for code in range(CODES)], 1).ravel(), one * CODES)
    likes = Ragged.from_lengths(leaves_of(kinds + 1, 3), one)
    weights = np.random.default_rng(0).random(len(truth.values)).astype(np.float32)
    return GrpoSamples(prompts_of_any_length(learner), truth, weights, likes)


def test_a_supervised_step_in_micro_batches_is_the_whole_step():
    """Against one full forward of every example alone."""
    whole, _ = learner_of()
    tokens = prompts_of_any_length(whole)
    is_target = np.random.default_rng(0).random(len(tokens.values)) < 0.6
    is_target[tokens.offsets[:-1]] = False
    expected = torch.zeros(())
    for row in range(len(tokens)):
        ids = torch.from_numpy(tokens[row].astype(np.int64))
        log_probs = whole.model(ids[None]).logits[0].log_softmax(-1)
        places = np.flatnonzero(Ragged(is_target, tokens.offsets)[row])
        expected = expected - log_probs[places - 1, ids[places]].sum()
    gradient = torch.cat([one.flatten() for one in torch.autograd.grad(expected, trainable(whole.model).values())])
    for budget in BUDGETS:
        learner, _ = learner_of(budget)
        sums = Supervised(learner)._gradient(Examples(tokens, is_target))
        assert sums["targets"] == is_target.sum()
        torch.testing.assert_close(sums["loss"], expected.detach(), **TOLERANCE)
        torch.testing.assert_close(learner.masters.gradient, gradient, **TOLERANCE)


def plain_grpo() -> tuple[torch.Tensor, torch.Tensor]:
    """Everything at once from given completions: the gradient, and how often each leaf was drawn."""
    learner, start = learner_of()
    samples = samples_of(learner)
    leaves, _ = sample_without_replacement(learner.model, samples.prompts, learner.trie, GROUP, SEEDS)
    truth = grpo_of(learner)._targets(samples.ground_truth, samples.truth_weights)
    likes = grpo_of(learner)._targets(samples.positives, np.ones(PROMPTS, np.float32))
    advantage, varied = advantages(REWARDER(leaves, truth, likes)[0], leaves >= 0, SETTINGS)
    assert varied.sum() > PROMPTS // 2
    with torch.no_grad(), learner.masters.replaced(start.tensors):
        before, _ = completion_log_probs(learner.model, samples.prompts, leaves, learner.trie)
    now, _ = completion_log_probs(learner.model, samples.prompts, leaves, learner.trie)
    group = Group(before, advantage, (leaves >= 0) & varied[:, None])
    grpo_loss(now, group, BETA)[0].backward()
    return learner.masters.gradient.clone(), torch.bincount(leaves.flatten(), minlength=len(SEMANTIC_IDS))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_grpo_step_in_micro_batches_is_the_whole_step(budget: int, recompute: bool):
    """The same completions, the same gradient."""
    learner, start = learner_of(budget, recompute)
    samples = samples_of(learner)
    sums, generated = grpo_of(learner)._gradient(samples, SEEDS, start)
    gradient, expected = plain_grpo()
    assert torch.equal(generated, expected)
    assert gradient.norm() > 0.1
    torch.testing.assert_close(learner.masters.gradient, gradient, **TOLERANCE)
    assert sums["completions"] == PROMPTS * GROUP and sums["groups"] == PROMPTS
    assert sums["tokens"] == samples.prompts.lengths.sum() + PROMPTS * GROUP * 2


def test_the_workers_draw_what_one_draws_and_their_gradients_add_up():
    whole, start = learner_of()
    samples = samples_of(whole)
    grpo_of(whole)._gradient(samples, SEEDS, start)
    parts = []
    for rank in range(3):
        learner, start = learner_of()
        grpo_of(learner)._gradient(samples.take(np.arange(PROMPTS)[rank::3]), SEEDS[rank::3], start)
        parts.append(learner.masters.gradient)
    torch.testing.assert_close(sum(parts), whole.masters.gradient, **TOLERANCE)


def test_a_step_moves_the_masters_by_the_clipped_mean_gradient():
    """A step is its gradient, divided by the completions that count and clipped, at its rate."""
    learner, start = learner_of()
    samples, before = samples_of(learner), learner.masters.copies()
    optimiser = Optimiser(learner.masters, 0.0, {})
    figures = grpo_of(learner).step(samples, start, np.random.default_rng(1), optimiser, 1e-3)
    # The same seeds that the step drew of its generator.
    seeds = np.random.default_rng(1).integers(1 << 62, size=PROMPTS)
    plain, start = learner_of()
    sums, generated = grpo_of(plain)._gradient(samples, seeds, start)
    gradient = plain.masters.gradient / sums["counts"]
    torch.testing.assert_close(
        learner.masters.gradient, gradient * min(1.0, LARGEST_NORM / (gradient.norm().item() + 1e-6)), **TOLERANCE
    )
    assert figures["most_frequent_share"] == float(generated.max()) / PROMPTS
    assert figures["loss"] == pytest.approx(float(sums["loss"] / sums["counts"]), rel=1e-4)
    # The first step of AdamW moves every weight with a gradient by the rate.
    moved = torch.cat([(learner.masters.values[name] - value).flatten() for name, value in before.items()])
    clear = gradient.abs() > 1e-4
    torch.testing.assert_close(moved[clear], -1e-3 * gradient[clear].sign(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_s_dpo_step_in_micro_batches_is_the_whole_step(budget: int):
    learner, start = learner_of(budget)
    prompts = prompts_of_any_length(learner)
    leaves = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(16), (PROMPTS, 1)), axis=1)[:, :4])
    leaves[2, 0] = leaves[3, 1:] = leaves[4, 2] = -1
    sums = Sdpo(learner, SETTINGS)._gradient(prompts, leaves, start)
    whole, start = learner_of()
    with torch.no_grad(), whole.masters.replaced(start.tensors):
        before, _ = completion_log_probs(whole.model, prompts, leaves, whole.trie)
    now, _ = completion_log_probs(whole.model, prompts, leaves, whole.trie)
    loss, margins = sdpo_loss(now, Compared(before, leaves >= 0), BETA)
    loss.backward()
    torch.testing.assert_close(learner.masters.gradient, whole.masters.gradient, **TOLERANCE)
    torch.testing.assert_close([sums["loss"], sums["margins"]], [loss.detach(), margins], **TOLERANCE)
    assert sums["counts"] == PROMPTS - 2


def test_a_budget_bounds_what_is_kept_for_the_gradient_and_so_does_computing_layers_again():
    """Bytes that autograd saves, at their peak: a ninth of the rows, a ninth of the bytes."""

    def peak(learner: Learner) -> int:
        held: dict[int, int] = {}
        most = [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        class Watched(Masters):
            def backward(self, loss: torch.Tensor) -> None:
                most[0] = max(most[0], sum(held.values()))
                super().backward(loss)
                held.clear()

        watched = Watched(trainable(learner.model), {})
        same = Ragged.from_lengths(np.full(36 * 24, 3, np.int32), np.full(36, 24))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Supervised(replace(learner, masters=watched))._gradient(Examples(same, np.ones(len(same.values), bool)))
        return most[0]

    weights = sum(value.nbytes for value in learner_of()[0].model.parameters())
    whole = peak(learner_of()[0]) - weights
    assert peak(learner_of(budget=4 * 24)[0]) - weights < whole / 6
    assert peak(learner_of(recompute=True)[0]) - weights < whole / 2


def test_a_model_whose_layers_cannot_be_computed_again_is_refused():
    with pytest.raises(ConfigError, match=r"recompute_layers = true.*tokens_at_once"):
        recompute_layers(torch.nn.Linear(2, 2))
