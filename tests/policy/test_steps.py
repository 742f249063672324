"""A step in micro-batches of any size, on any number of workers and with layers computed again is the whole step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import CODES, KINDS, SEMANTIC_IDS, TRIE, leaves_of, tiny_config, tiny_model

from conrec.errors import ConfigError
from conrec.policy.decoding import DeviceTrie, completion_log_probs, sample_without_replacement
from conrec.policy.grpo import advantages, grpo_loss
from conrec.policy.masters import Masters
from conrec.policy.model import recompute_layers, trainable
from conrec.policy.rewards import Rewarder
from conrec.policy.samples import GrpoSamples
from conrec.policy.sdpo import sdpo_loss
from conrec.policy.steps import Steps
from conrec.policy.tasks import Examples
from conrec.ragged import Ragged

GROUP, BETA, PROMPTS = 4, 0.3, 9
SEEDS = np.random.default_rng(1).integers(1 << 62, size=PROMPTS)
WHOLE = 100_000
BUDGETS = [WHOLE, 120, 40, 1]
"""Everything at once; some prompts with their groups; pieces of a group; one completion at a time."""
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def steps_of(budget: int = WHOLE, recompute: bool = False, **sections) -> tuple[Steps, dict[str, torch.Tensor]]:
    """Steps of a model that has left its start, and the tensors of that start."""
    train = {"tokens_at_once": budget, "recompute_layers": recompute}
    grpo = {"group_size": GROUP, "normalise_std": False, "min_reward_range": 0.0}
    config = tiny_config(train=train, grpo=grpo, **({"model": {"attention_dropout": 0}} | sections))
    model, _, vocabulary = tiny_model(config)
    model.eval()
    if recompute:
        recompute_layers(model)
    start = {name: value.detach().clone() for name, value in trainable(model).items()}
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in trainable(model).values():
            value += 0.05 * torch.randn(value.shape, generator=random).to(value.dtype)
    rewarder = Rewarder(torch.eye(len(SEMANTIC_IDS)), torch.from_numpy(TRIE.semantic_ids), "prefix", 0.5)
    masters = Masters(trainable(model), {})
    return Steps(model, DeviceTrie(TRIE, vocabulary), rewarder, masters, config), start


def prompts_of_any_length(steps: Steps) -> Ragged:
    lengths = np.array([3, 17, 9, 9, 30, 1, 12, 17, 5])
    tokens = np.random.default_rng(0).integers(2, steps.model.config.vocab_size, lengths.sum())
    return Ragged.from_lengths(tokens.astype(np.int32), lengths)


def samples_of(steps: Steps) -> GrpoSamples:
    kinds, one = np.arange(PROMPTS) % KINDS, np.ones(PROMPTS, np.int64)
    truth = Ragged.from_lengths(np.stack([leaves_of(kinds, code) for code in range(CODES)], 1).ravel(), one * CODES)
    likes = Ragged.from_lengths(leaves_of(kinds + 1, 3), one)
    weights = np.random.default_rng(0).random(len(truth.values)).astype(np.float32)
    return GrpoSamples(prompts_of_any_length(steps), truth, weights, likes)


def test_a_supervised_step_in_micro_batches_is_the_whole_step():
    """Against one full forward of every example alone."""
    whole, _ = steps_of()
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
        steps, _ = steps_of(budget)
        sums = steps.supervised(Examples(tokens, is_target))
        assert sums["targets"] == is_target.sum()
        torch.testing.assert_close(sums["loss"], expected.detach(), **TOLERANCE)
        torch.testing.assert_close(steps.masters.gradient, gradient, **TOLERANCE)


def plain_grpo(updates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything at once from given completions: gradient of the last update, and the leaves."""
    steps, start = steps_of()
    samples, settings = samples_of(steps), steps.config.grpo
    leaves, _ = sample_without_replacement(steps.model, samples.prompts, steps.trie, GROUP, SEEDS)
    truth = steps._targets(samples.ground_truth, samples.truth_weights)
    likes = steps._targets(samples.positives, np.ones(PROMPTS, np.float32))
    advantage, varied = advantages(steps.rewarder(leaves, truth, likes)[0], leaves >= 0, settings)
    assert varied.sum() > PROMPTS // 2
    with torch.no_grad():
        old, _ = completion_log_probs(steps.model, samples.prompts, leaves, steps.trie)
        with steps.masters.replaced(start):
            before, _ = completion_log_probs(steps.model, samples.prompts, leaves, steps.trie)
    for update in range(updates):
        if update:
            moved(steps)
        steps.masters.clear()
        now, _ = completion_log_probs(steps.model, samples.prompts, leaves, steps.trie)
        counts = (leaves >= 0) & varied[:, None]
        grpo_loss(now, old, before, advantage, counts, BETA, settings)[0].backward()
    return steps.masters.gradient.clone(), leaves


def moved(steps: Steps) -> None:
    with torch.no_grad():
        for value in trainable(steps.model).values():
            value *= 1.01


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_grpo_step_in_micro_batches_is_the_whole_step(budget: int, recompute: bool):
    """The same completions, the same gradient, at the first update and the second."""
    steps, start = steps_of(budget, recompute)
    samples = samples_of(steps)
    steps.masters.clear()
    rollouts, sums = steps.grpo(samples, SEEDS, start, BETA)
    gradient, leaves = plain_grpo(1)
    rows = np.lexsort((np.arange(PROMPTS), -samples.prompts.lengths))
    assert torch.equal(torch.cat([one.leaves for one in rollouts]), leaves[torch.from_numpy(rows)])
    assert gradient.norm() > 0.1
    torch.testing.assert_close(steps.masters.gradient, gradient, **TOLERANCE)
    assert sums["completions"] == PROMPTS * GROUP and sums["groups"] == PROMPTS
    assert sums["tokens"] == samples.prompts.lengths.sum() + PROMPTS * GROUP * 2
    moved(steps)
    steps.masters.clear()
    again = steps.grpo_again(rollouts, BETA)
    torch.testing.assert_close(steps.masters.gradient, plain_grpo(2)[0], **TOLERANCE)
    assert again.keys() == {"loss", "kl"} and again["kl"] != sums["kl"]


def test_the_workers_draw_what_one_draws_and_their_gradients_add_up():
    whole, start = steps_of()
    samples = samples_of(whole)
    whole.grpo(samples, SEEDS, start, BETA)
    parts = []
    for rank in range(3):
        steps, start = steps_of()
        steps.grpo(samples.take(np.arange(PROMPTS)[rank::3]), SEEDS[rank::3], start, BETA)
        parts.append(steps.masters.gradient)
    torch.testing.assert_close(sum(parts), whole.masters.gradient, **TOLERANCE)


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_s_dpo_step_in_micro_batches_is_the_whole_step(budget: int):
    steps, start = steps_of(budget)
    prompts = prompts_of_any_length(steps)
    leaves = torch.from_numpy(np.random.default_rng(0).permuted(np.tile(np.arange(16), (PROMPTS, 1)), axis=1)[:, :4])
    leaves[2, 0] = leaves[3, 1:] = leaves[4, 2] = -1
    sums = steps.sdpo(prompts, leaves, start, BETA)
    whole, start = steps_of()
    with torch.no_grad(), whole.masters.replaced(start):
        before, _ = completion_log_probs(whole.model, prompts, leaves, whole.trie)
    now, _ = completion_log_probs(whole.model, prompts, leaves, whole.trie)
    loss, margins = sdpo_loss(now, before, leaves >= 0, BETA)
    loss.backward()
    torch.testing.assert_close(steps.masters.gradient, whole.masters.gradient, **TOLERANCE)
    torch.testing.assert_close([sums["loss"], sums["margins"]], [loss.detach(), margins], **TOLERANCE)
    assert sums["counts"] == PROMPTS - 2


def test_a_budget_bounds_what_is_kept_for_the_gradient_and_so_does_computing_layers_again():
    """Bytes that autograd saves, at their peak: a ninth of the rows, a ninth of the bytes."""

    def peak(steps: Steps) -> int:
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

        watched = Watched(trainable(steps.model), {})
        same = Ragged.from_lengths(np.full(36 * 24, 3, np.int32), np.full(36, 24))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            Steps(steps.model, steps.trie, steps.rewarder, watched, steps.config).supervised(
                Examples(same, np.ones(len(same.values), bool))
            )
        return most[0]

    weights = sum(value.nbytes for value in steps_of()[0].model.parameters())
    whole = peak(steps_of()[0]) - weights
    assert peak(steps_of(budget=4 * 24)[0]) - weights < whole / 6
    assert peak(steps_of(recompute=True)[0]) - weights < whole / 2


def test_a_model_whose_layers_cannot_be_computed_again_is_refused():
    with pytest.raises(ConfigError, match=r"recompute_layers = true.*tokens_at_once"):
        recompute_layers(torch.nn.Linear(2, 2))
