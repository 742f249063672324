"""Small updates arrive, however coarse the model's weights are; killed and resumed, nothing of them is lost."""

import copy

import pytest
import torch
from worlds import SEMANTIC_IDS, TRIE, fhr_at_1, tiny_config, tiny_data, tiny_model

from conrec.policy.decoding import DeviceTrie
from conrec.policy.loop import LoopState, TrainingLoop
from conrec.policy.masters import Masters
from conrec.policy.model import trainable
from conrec.policy.optimiser import Optimiser

BFLOAT16 = torch.bfloat16


def stepped(dtype: torch.dtype, steps: int, rate: float) -> tuple[torch.nn.Parameter, Masters]:
    """A weight after so many equal gradients: AdamW moves it by the rate each time."""
    weight = torch.nn.Parameter(torch.full((8,), 0.02, dtype=dtype))
    masters = Masters({"weight": weight}, {})
    optimiser = Optimiser(masters, 0.0, {})
    for _ in range(steps):
        masters.clear()
        masters.backward((weight * 0.01).sum())
        optimiser.step(1.0, rate)
    return weight.detach(), masters


def test_the_sum_of_many_tiny_steps_arrives():
    """1,000 steps of 1e-6 make 1e-3, where every one of them is less than half a unit of bfloat16 at .02 (6e-5)."""
    start = torch.full((8,), 0.02, dtype=BFLOAT16)
    assert (start - 1e-6 == start).all()
    moved, masters = stepped(BFLOAT16, 1000, 1e-6)
    torch.testing.assert_close(masters.rounded()["weight"], start.float() - 1e-3, rtol=0, atol=1e-6)
    assert torch.equal(moved, masters.rounded()["weight"].to(BFLOAT16)) and (moved != start).all()


def test_gradients_of_micro_batches_add_up_in_float32():
    """A bfloat16 sum would stop at 256."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=BFLOAT16))
    masters = Masters({"weight": weight}, {})
    for _ in range(1000):
        masters.backward(weight.sum())
    assert masters.gradient.item() == 1000 and weight.grad is None


def test_parameters_in_float32_are_their_own_masters():
    plain = torch.nn.Parameter(torch.full((8,), 0.02))
    adam = torch.optim.AdamW([plain], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        plain.grad = torch.full((8,), 0.01)
        adam.step()
    moved, masters = stepped(torch.float32, 5, 1e-3)
    assert not masters.rounded()
    torch.testing.assert_close(moved, plain.detach(), rtol=1e-6, atol=0)


def test_gradients_are_clipped_at_the_global_norm_and_absent_ones_are_zero():
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in "abc"}
    masters = Masters(weights, {})
    masters.backward(30 * weights["a"][0] + 40 * weights["b"][1])
    Optimiser(masters, 0.0, {}).step(0.5, 0.0)
    torch.testing.assert_close(masters.gradient, torch.tensor([0.6, 0, 0, 0.8, 0, 0]))


def test_copies_come_back_to_the_last_bit():
    _, masters = stepped(BFLOAT16, 7, 1e-6)
    kept, rounded = masters.copies(), masters.parameters["weight"].detach().clone()
    masters.restore({"weight": kept["weight"] + 1})
    assert (masters.parameters["weight"] > 1).all()
    masters.restore(kept)
    assert torch.equal(masters.rounded()["weight"], kept["weight"])
    assert torch.equal(masters.parameters["weight"], rounded)


CONFIG = tiny_config(
    model={"dtype": "bfloat16"},
    supervised={"warmup_epochs": 2, "learning_rate": 1e-4},
    grpo={
        "stages": [{"name": "all", "blocks": ["negatives"], "steps": 6, "beta": 0.02}],
        "learning_rate": 1e-5,
        "evaluate_every": 3,
    },
    train={"checkpoint_every": 2},
)


def run(model: torch.nn.Module, vocabulary, state: LoopState | None = None, checkpoint=lambda state: None) -> None:
    vectors, codes = torch.eye(len(SEMANTIC_IDS)), torch.from_numpy(TRIE.semantic_ids)
    data, trie = tiny_data(CONFIG, vocabulary), DeviceTrie(TRIE, vocabulary)
    TrainingLoop(model, data, trie, vectors, codes, CONFIG, fhr_at_1, lambda row: None, checkpoint, state).run()


@pytest.mark.parametrize("stop", ["warm_up", "all"])
def test_a_resumed_run_of_bfloat16_keeps_its_masters(stop):
    """Bit for bit: what is read back is the checkpoint's, the model's rounded weights and the float32 masters."""
    model, _, vocabulary = tiny_model(CONFIG)
    assert next(model.parameters()).dtype == BFLOAT16
    saved = []
    run(
        model,
        vocabulary,
        checkpoint=lambda state: saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(state))),
    )
    last = saved[-1][1].tensors["masters"]
    assert last.keys() == trainable(model).keys() and all(value.dtype == torch.float32 for value in last.values())
    # A step of 1e-5 does not show in most of the rounded weights.
    assert any((value != value.to(BFLOAT16)).float().mean() > 0.9 for value in last.values())
    weights, state = next(one for one in saved if (one[1].phase == 1) == (stop == "all") and one[1].step == 2)
    resumed, _, _ = tiny_model(CONFIG)
    resumed.load_state_dict(weights)
    run(resumed, vocabulary, state)
    for name, value in last.items():
        assert torch.equal(state.tensors["masters"][name], value), name
        assert torch.equal(trainable(resumed)[name], value.to(BFLOAT16)), name
