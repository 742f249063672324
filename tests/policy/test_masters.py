"""Small updates arrive, however coarse the model's weights are; killed and resumed, nothing of them is lost."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from worlds import SEMANTIC_IDS, TRIE, fhr_at_1, tiny_config, tiny_data, tiny_model

from conrec.policy.decoding import DeviceTrie
from conrec.policy.loop import LoopState, TrainingLoop
from conrec.policy.masters import Masters
from conrec.policy.model import trainable
from conrec.policy.optimiser import Optimiser, collected, part

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


def test_gradients_of_a_micro_batch_are_never_in_memory_together():
    """All of them in bfloat16 would be as large as the model, beside the float32 sum."""
    weights = {name: torch.nn.Parameter(torch.ones(2, 2, dtype=BFLOAT16)) for name in "abc"}
    masters, alive = Masters(weights, {}), []
    value = torch.ones(1, 2, dtype=BFLOAT16, requires_grad=True)
    for weight in weights.values():
        value.register_hook(lambda _: alive.append(sum(one.grad is not None for one in weights.values())))
        value = value @ weight
    masters.backward(value.sum())
    assert alive == [0, 0, 0] and (masters.gradient == 4).all()


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


def mixed() -> dict[str, torch.nn.Parameter]:
    """47 numbers: no share of two or three workers begins or ends with a parameter."""
    torch.manual_seed(0)
    shapes = {"a": (3, 5), "b": (2,), "c": (7, 4), "d": (1, 2)}
    dtypes = {"a": BFLOAT16, "b": torch.float32, "c": torch.float32, "d": BFLOAT16}
    return {name: torch.nn.Parameter(torch.randn(shape).to(dtypes[name])) for name, shape in shapes.items()}


def train_mixed(weights: dict[str, torch.nn.Parameter], state: dict, worker: int, workers: int, file: Path) -> None:
    """Three steps, of which the state after the second comes back for the third; what the first worker then has."""
    masters = Masters(weights, {name[8:]: value for name, value in state.items() if name.startswith("masters|")})
    kept = {name[10:]: value for name, value in state.items() if name.startswith("optimiser|")}
    optimiser = Optimiser(masters, 0.01, part(kept, masters))
    for step in range(3):
        masters.clear()
        for row in range(worker, 6, workers):  # one micro-batch each: bfloat16 rounds its gradient alike for all counts
            masters.backward(sum((weight.float() - row - step).square().sum() for weight in weights.values()))
        optimiser.step(0.1, 1e-2)
        if step == 1:
            copies = masters.copies()
    masters.restore(copies)
    with masters.replaced(masters.whole({name: 2 * value for name, value in copies.items()})):
        doubled = {name: weight.detach().clone() for name, weight in weights.items()}
    groups = {
        "masters": masters.collected(masters.rounded()),
        "copies": masters.collected(copies),
        "optimiser": collected(optimiser.kept(), masters),
        "weights": {name: weight.detach().clone() for name, weight in weights.items()},
        "doubled": doubled,
    }
    if worker == 0:
        named = {f"{group}|{name}": value for group, one in groups.items() for name, value in one.items()}
        save_file({name: value.contiguous() for name, value in named.items()}, file)
    assert sum(value.numel() for value in masters.values.values()) <= -(-47 // workers)


def one_of(worker: int, workers: int, start: str, file: str) -> None:
    if workers > 1:
        distributed.init_process_group("gloo", f"file://{file}.meet", rank=worker, world_size=workers)
    weights, state = mixed(), load_file(start) if start else {}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(state.get(f"weights|{name}", weight))
    train_mixed(weights, state, worker, workers, Path(file))
    if workers > 1:
        distributed.destroy_process_group()


@pytest.mark.long
def test_shares_of_the_masters_make_the_steps_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers begin and two go on from what the first of them saved, beside one alone.

    Tolerance: float32 1e-5, as of a sum in another order, and in bfloat16 one unit.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ends = []
    for counts in ((1, 1), (3, 2)):
        start = ""
        for workers in counts:
            file = str(tmp_path / f"{counts[0]}-{workers}-{bool(start)}")
            if workers == 1:
                one_of(0, 1, start, file)
            else:
                multiprocessing.spawn(one_of, (workers, start, file), workers)
            start = file
        ends.append(load_file(start))
    alone, shared = ends
    assert shared.keys() == alone.keys()
    for name, value in alone.items():
        assert shared[name].dtype == value.dtype and shared[name].shape == value.shape, name
        relative = 8e-3 if value.dtype == BFLOAT16 else 1e-5
        torch.testing.assert_close(shared[name], value, rtol=relative, atol=1e-6, msg=name)


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
