"""The objective against its formula, what is compared with what, and a stage that learns by it."""

import copy
import dataclasses
import math
from itertools import chain

import numpy as np
import pytest
import torch
from worlds import (
    KINDS,
    SEMANTIC_IDS,
    TRIE,
    fhr_at_1,
    leaves_of,
    prompts_of,
    tiny_config,
    tiny_data,
    tiny_model,
)

from conrec.config import GrpoStage
from conrec.policy.decoding import DeviceTrie, completion_log_probs
from conrec.policy.loop import TrainingLoop
from conrec.policy.samples import GrpoSamples
from conrec.policy.sdpo import Compared, draw_comparisons, sdpo_loss
from conrec.ragged import Ragged

STAGE = {"name": "all", "blocks": ["negatives", "positives"], "steps": 60, "beta": 0.5, "objective": "s_dpo"}


def plain_loss(gained, beta):
    """From the formula, for log-ratios of the chosen completion and the others."""
    total = sum(math.exp(beta * (other - gained[0])) for other in gained[1:])
    return -math.log(1 / (1 + math.exp(math.log(total))))


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_loss_is_the_formula(beta):
    reference = torch.tensor([[[-1.0, -2.0], [-0.5, -1.0], [-3.0, -0.1]]])
    shifts = torch.tensor([[[0.3, 0.2], [-0.4, 0.1], [0.1, 0.6]]])
    loss, margin = sdpo_loss(reference + shifts, Compared(reference, torch.ones(1, 3, dtype=torch.bool)), beta)
    assert loss.item() == pytest.approx(plain_loss([0.5, -0.3, 0.7], beta), rel=1e-5)
    assert margin.item() == pytest.approx(0.5 - 0.7, rel=1e-5)


def test_an_unmoved_policy_loses_the_logarithm_of_the_choices_and_samples_are_summed():
    zeros = torch.zeros(2, 4, 2)
    loss, _ = sdpo_loss(zeros, Compared(zeros, torch.tensor([[True] * 4, [True, True, False, False]])), 0.7)
    assert loss.item() == pytest.approx(math.log(4) + math.log(2), rel=1e-6)


def test_only_whole_comparisons_have_a_gradient():
    log_probs = torch.zeros(3, 3, 2, requires_grad=True)
    drawn = torch.tensor([[True, True, False], [False, True, True], [True, False, False]])
    loss, margin = sdpo_loss(log_probs, Compared(torch.full((3, 3, 2), -1.0), drawn), 0.5)
    loss.backward()
    assert torch.isfinite(log_probs.grad).all() and margin.item() == 0
    assert log_probs.grad[0, 0].max() < 0 < log_probs.grad[0, 1].min()
    assert log_probs.grad[0, 2].abs().max() == log_probs.grad[1:].abs().max() == 0


def samples_of(truth, weights, positives):
    ragged = [
        Ragged.from_lengths(np.array(list(chain(*rows)), np.int32), [len(row) for row in rows])
        for rows in ([[0]] * len(truth), truth, positives)
    ]
    return GrpoSamples(ragged[0], ragged[1], np.array(list(chain(*weights)), np.float32), ragged[2])


def drawn_leaves(samples, count, draws=60):
    random = np.random.default_rng(0)
    leaves = np.stack([draw_comparisons(samples, count, random) for _ in range(draws)])
    return [
        (set(leaves[:, row, 0].tolist()), set(leaves[:, row, 1:].ravel().tolist()), leaves[:, row])
        for row in range(leaves.shape[1])
    ]


def test_chosen_are_observed_rejections_and_others_the_own_likes():
    samples = samples_of(
        truth=[[1, 2, 3], [4], [5]],
        weights=[[1, 1, 0.1], [0.1], [1]],
        positives=[[6, 7, 7, 2, 8], [9], [10]],
    )
    mixed, only_neighbours, short = drawn_leaves(samples, count=2)
    assert mixed[0] == {1, 2}
    # 7 is liked twice and counts once; 2 is rejected too and is no like.
    assert mixed[1] == {6, 7, 8}
    assert (mixed[2][:, 1] != mixed[2][:, 2]).all()
    assert only_neighbours[0] == {-1}
    assert short[:2] == ({5}, {10, -1})
    assert (short[2][:, 1] == 10).all()


def test_an_anchor_without_likes_borrows_those_of_others_but_not_its_own_ground_truth():
    samples = samples_of(truth=[[1, 2], [3], [4]], weights=[[1, 0.1], [1], [1]], positives=[[], [1, 2, 5], [5, 6]])
    borrowing, own, _ = drawn_leaves(samples, count=2)
    assert borrowing[1] == {5, 6}
    assert (borrowing[2][:, 1] != borrowing[2][:, 2]).all()
    assert own[1] == {1, 2, 5}


def test_nobody_likes_anything():
    samples = samples_of(truth=[[1], []], weights=[[1], []], positives=[[], []])
    assert draw_comparisons(samples, 3, np.random.default_rng(0)).tolist() == [[1, -1, -1, -1], [-1, -1, -1, -1]]


def test_a_beta_of_zero_is_refused():
    with pytest.raises(ValueError, match="beta = 0"):
        GrpoStage(**STAGE | {"beta": 0})
    assert GrpoStage(**STAGE | {"beta": 0, "objective": "grpo"}).beta == 0


def run(config, state=None, checkpoint=lambda state: None, model=None, evaluate=fhr_at_1, change=lambda data: data):
    fresh, _, vocabulary = tiny_model(config)
    model, rows = model or fresh, []
    data = change(tiny_data(config, vocabulary))
    trie = DeviceTrie(TRIE, vocabulary)
    vectors = torch.eye(len(SEMANTIC_IDS))
    codes = torch.from_numpy(TRIE.semantic_ids)
    TrainingLoop(model, data, trie, vectors, codes, config, evaluate, rows.append, checkpoint, state).run()
    return model, vocabulary, rows


def log_odds(model, vocabulary):
    """How much more probable what will be rejected is than what will be liked, in nats, mean over the kinds."""
    kinds = np.arange(KINDS)
    leaves = torch.from_numpy(np.stack([leaves_of(kinds, 3), leaves_of(kinds + 1, 3)], 1))
    log_probs, _ = completion_log_probs(model, prompts_of(kinds, vocabulary), leaves, DeviceTrie(TRIE, vocabulary))
    totals = log_probs.sum(-1)
    return (totals[:, 0] - totals[:, 1]).mean().item()


@pytest.mark.long
def test_a_stage_raises_what_will_be_rejected_over_what_will_be_liked():
    before, vocabulary, _ = run(tiny_config(grpo={"stages": []}))
    # S-DPO compares two leaves and leaves the first place open: whether the stage is accepted is not asked here.
    rising = iter(np.linspace(0.1, 1.0, 50))
    config = tiny_config(grpo={"stages": [STAGE], "evaluate_every": 60})
    after, _, rows = run(config, evaluate=lambda leaves: {"fhr": next(rising), "fph": 0.1})
    assert log_odds(after, vocabulary) > log_odds(before, vocabulary) + 2
    steps = [row for row in rows if "margin" in row]
    assert len(steps) == STAGE["steps"]
    # The first step compares the policy with itself: one like a sample, so log 2.
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert steps[-1]["loss"] < 0.4 and steps[-1]["margin"] > 2
    assert steps[0]["samples_without_comparison"] == 0 and "reward" not in steps[0]
    verdict = next(row for row in rows if "stage_accepted" in row)
    assert verdict["stage_accepted"] and verdict["after_fhr"] > verdict["before_fhr"]


def test_samples_without_a_rejection_teach_nothing():
    def only_neighbours(data):
        stages = {
            name: dataclasses.replace(samples, truth_weights=np.full_like(samples.truth_weights, 0.1))
            for name, samples in data.stages.items()
        }
        return dataclasses.replace(data, stages=stages)

    config = tiny_config(grpo={"stages": [STAGE | {"steps": 2}]}, supervised={"warmup_epochs": 1})
    rising = iter(np.linspace(0.1, 1.0, 10))
    untaught, _, rows = run(config, change=only_neighbours, evaluate=lambda leaves: {"fhr": next(rising), "fph": 0.1})
    assert next(row for row in rows if "margin" in row)["samples_without_comparison"] == 1
    before, _, _ = run(tiny_config(grpo={"stages": []}, supervised={"warmup_epochs": 1}))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(untaught.state_dict()[name], value, rtol=0, atol=0)


def much_to_draw(data):
    """Every sample rejects three leaves of code 3 and likes the twelve leaves of other codes."""
    count = len(data.validation) * 16
    truth = np.tile(np.array([3, 7, 11], np.int32), count)
    likes = np.tile(np.setdiff1d(np.arange(len(SEMANTIC_IDS), dtype=np.int32), [3, 7, 11, 15]), count)
    stages = {
        name: dataclasses.replace(
            samples,
            ground_truth=Ragged.from_lengths(truth, np.full(count, 3)),
            truth_weights=np.ones(len(truth), np.float32),
            positives=Ragged.from_lengths(likes, np.full(count, 12)),
        )
        for name, samples in data.stages.items()
    }
    return dataclasses.replace(data, stages=stages)


@pytest.mark.parametrize(("group_size", "others"), [(3, 2), (9, 8), (16, 8)])
def test_a_group_less_one_is_compared_and_at_most_eight(group_size, others):
    config = tiny_config(
        grpo={"stages": [STAGE | {"steps": 1}], "group_size": group_size}, supervised={"warmup_epochs": 0}
    )
    _, _, rows = run(config, change=much_to_draw)
    assert next(row for row in rows if "margin" in row)["loss"] == pytest.approx(math.log(1 + others), rel=1e-5)


def test_a_resumed_stage_ends_like_an_undisturbed_one():
    config = tiny_config(
        grpo={"stages": [STAGE | {"steps": 12}], "evaluate_every": 6},
        supervised={"warmup_epochs": 1},
        train={"checkpoint_every": 5},
    )
    saved = []
    model, _, _ = tiny_model(config)
    whole, _, rows = run(
        config,
        model=model,
        change=much_to_draw,
        checkpoint=lambda state: saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(state))),
    )
    weights, state = next(kept for kept in saved if kept[1].tensors["reference"] and kept[1].step == 5)
    resumed, _, _ = tiny_model(config)
    resumed.load_state_dict(weights)
    run(config, model=resumed, state=state, change=much_to_draw)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
    assert len(state.rows) == len(rows)
