"""The loop learns a known aversion, rejects a stage that makes things worse, and resumes where it was killed."""

import copy
import json

import numpy as np
import pytest
import torch
from worlds import KINDS, SEMANTIC_IDS, TRIE, fhr_at_1, leaves_of, prompts_of, tiny_config, tiny_data, tiny_model

from conrec.policy.decoding import DeviceTrie, completion_log_probs
from conrec.policy.loop import TrainingLoop

VECTORS = np.eye(len(SEMANTIC_IDS), dtype=np.float32)


def run(config, evaluate=fhr_at_1, state=None, checkpoint=lambda state: None, model=None):
    fresh, _, vocabulary = tiny_model(config)
    model = model or fresh
    rows = []
    loop = TrainingLoop(
        model,
        tiny_data(config, vocabulary),
        DeviceTrie(TRIE, vocabulary),
        torch.from_numpy(VECTORS),
        torch.from_numpy(TRIE.semantic_ids),
        config,
        evaluate,
        rows.append,
        checkpoint,
        state,
    )
    loop.run()
    return model, vocabulary, rows


def probability_of_the_right_one(model, vocabulary):
    kinds = np.arange(KINDS)
    leaves = torch.from_numpy(leaves_of(kinds, 3))[:, None]
    log_probs, _ = completion_log_probs(model, prompts_of(kinds, vocabulary), leaves, DeviceTrie(TRIE, vocabulary))
    return log_probs.sum(-1).exp().mean().item()


def test_grpo_raises_the_reward_and_the_probability_of_what_will_be_rejected():
    supervised_only = tiny_config(grpo={"stages": []})
    before, vocabulary, _ = run(supervised_only)
    after, _, rows = run(tiny_config())
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:20]) + 0.05
    assert probability_of_the_right_one(after, vocabulary) > 3 * probability_of_the_right_one(before, vocabulary)
    verdict = next(row for row in rows if "stage_accepted" in row)
    assert verdict["stage_accepted"] and verdict["after_fhr"] > verdict["before_fhr"]


def test_a_stage_that_does_not_help_is_dropped():
    falling = iter(np.linspace(1.0, 0.1, 50))
    after, _, rows = run(tiny_config(), evaluate=lambda leaves, log_probs: {"fhr": next(falling), "fph": 0.1})
    assert not next(row for row in rows if "stage_accepted" in row)["stage_accepted"]
    before, _, _ = run(tiny_config(grpo={"stages": []}))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_resumed_run_ends_like_an_undisturbed_one(stop_at):
    config = tiny_config(train={"checkpoint_every": 25, "cpus_per_worker": 1})
    whole, _, rows = run(config)
    saved = []

    def keep(model):
        def checkpoint(state):
            json.dumps({name: value for name, value in vars(state).items() if name != "tensors"})
            saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(state)))

        return checkpoint

    model, _, _ = tiny_model(config)
    run(config, model=model, checkpoint=keep(model))
    weights, state = saved[stop_at]
    resumed, _, _ = tiny_model(config)
    resumed.load_state_dict(weights)
    run(config, model=resumed, state=state)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert len(state.rows) == len(rows)


def test_every_row_has_the_figures_that_are_watched():
    _, _, rows = run(tiny_config())
    step = next(row for row in rows if "reward" in row)
    wanted = {"loss", "reward", "reward_gain", "reward_penalty", "kl", "entropy", "groups_without_variance"}
    assert wanted | {"most_frequent_share", "tokens_per_second"} <= step.keys()
    assert any("alignment_accuracy" in row for row in rows)
