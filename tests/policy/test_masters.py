"""Small updates arrive, however coarse the model's weights are; killed and resumed, nothing of them is lost."""

import copy
import dataclasses
import weakref
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
from conrec.policy.model import trainable, write_tensors
from conrec.policy.optimiser import Optimiser, collected, part
from conrec.policy.workers import Inputs, begun

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
        "tolerance": 1,  # the best state stands: a checkpoint after the third step has one
    },
    train={"checkpoint_every": 2},
)


Checkpoint = tuple[dict[str, torch.Tensor], LoopState]
"""All weights of the model, and the state beside them."""


def run(start: Checkpoint | None = None) -> list[Checkpoint]:
    """The checkpoints of a run, from the beginning or from one of them."""
    model, _, vocabulary = tiny_model(CONFIG)
    state = None
    if start:
        weights, state = copy.deepcopy(start)
        model.load_state_dict(weights)
    saved: list[Checkpoint] = []

    def checkpoint(state: LoopState) -> None:
        saved.append(copy.deepcopy((model.state_dict(), state)))

    vectors, codes = torch.eye(len(SEMANTIC_IDS)), torch.from_numpy(TRIE.semantic_ids)
    data, trie = tiny_data(CONFIG, vocabulary), DeviceTrie(TRIE, vocabulary)
    TrainingLoop(model, data, trie, vectors, codes, CONFIG, fhr_at_1, lambda row: None, checkpoint, state).run()
    return saved


def place(checkpoint: Checkpoint) -> tuple[int, int]:
    return checkpoint[1].phase, checkpoint[1].step


def assert_same(resumed: list[Checkpoint], saved: list[Checkpoint]) -> None:
    """Bit for bit, and at every checkpoint: at its end a stage goes back to a state from before."""
    rest = saved[-len(resumed) :]
    assert [place(one) for one in resumed] == [place(one) for one in rest]
    for (weights, state), (wanted, known) in zip(resumed, rest, strict=True):
        for found, group in (
            (weights, wanted),
            *((state.tensors[name], known.tensors[name]) for name in known.tensors),
        ):
            assert found.keys() == group.keys()
            assert all(torch.equal(found[name], value) for name, value in group.items()), place((weights, state))


def assert_rounded(saved: list[Checkpoint]) -> None:
    """The model is the masters, rounded."""
    for weights, state in saved:
        for name, value in state.tensors["masters"].items():
            assert torch.equal(weights[name], value.to(BFLOAT16)), name


@pytest.mark.parametrize("stop", [(0, 2), (1, 4)], ids=["warm_up", "stage"])
def test_a_resumed_run_of_bfloat16_keeps_its_masters(stop: tuple[int, int]) -> None:
    """What is read back is the checkpoint's: the model's rounded weights, and the float32 masters."""
    saved = run()
    masters, parameters = saved[-1][1].tensors["masters"], trainable(tiny_model(CONFIG)[0])
    assert {one.dtype for one in parameters.values()} == {BFLOAT16}
    assert masters.keys() == parameters.keys() and all(value.dtype == torch.float32 for value in masters.values())
    # A step of 1e-5 does not show in most of the rounded weights.
    assert any((value != value.to(BFLOAT16)).float().mean() > 0.9 for value in masters.values())
    assert_rounded(saved)
    resumed = run(next(one for one in saved if place(one) == stop))
    assert len(resumed) == sum(place(one) > stop for one in saved)
    assert_same(resumed, saved)


def test_what_stages_begin_from_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Float32, four bytes a parameter in every worker of a node; of several workers each needs its share alone."""
    model, _, vocabulary = tiny_model(CONFIG)
    url = str(tmp_path / "policy.safetensors")
    write_tensors({name: value.detach().float() + 1e-6 for name, value in trainable(model).items()}, url)
    data, trie = tiny_data(CONFIG, vocabulary), DeviceTrie(TRIE, vocabulary)
    stages = dataclasses.replace(data, tasks={})
    state = begun(Inputs(CONFIG, [], TRIE, "", "", url), stages, model, None)
    assert state is not None
    read = {name: (weakref.ref(value), value.clone()) for name, value in state.tensors["masters"].items()}
    vectors, codes = torch.eye(len(SEMANTIC_IDS)), torch.from_numpy(TRIE.semantic_ids)
    loop = TrainingLoop(
        model, stages, trie, vectors, codes, CONFIG, fhr_at_1, lambda row: None, lambda state: None, state
    )
    assert read.keys() == trainable(model).keys() and all(held() is None for held, _ in read.values())
    assert all(torch.equal(loop.state.tensors["masters"][name], value) for name, (_, value) in read.items())


MIDDLE = (1, 4)
"""After a measurement, with a best state; one checkpoint before the stage goes back to it."""


def shared_run(worker: int, workers: int, folder: str) -> None:
    """A run, and again what follows a checkpoint of the first worker in the middle of the stage."""
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=worker, world_size=workers)
    saved, file = run(), Path(folder, "saved")
    if worker == 0:
        assert_rounded(saved)
        torch.save(saved, file)
    distributed.barrier()
    middle = next(one for one in torch.load(file, weights_only=False) if place(one) == MIDDLE)
    assert_same(run(middle), saved)
    distributed.destroy_process_group()


@pytest.mark.long
def test_two_workers_go_on_to_the_last_bit_and_one_goes_on_with_what_they_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker adds up in another order: tolerance a tenth of a step of 1e-5."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(shared_run, (2, str(tmp_path)), 2)
    saved = torch.load(tmp_path / "saved", weights_only=False)
    middle, later = (next(one for one in saved if place(one) == at) for at in (MIDDLE, (1, 6)))
    shapes = {name: value.shape for name, value in trainable(tiny_model(CONFIG)[0]).items()}
    for group in ("reference", "best", "masters"):
        assert {name: value.shape for name, value in middle[1].tensors[group].items()} == shapes, group
    alone = run(middle)[0]
    assert place(alone) == place(later)
    ends = [
        torch.cat([value.flatten() for value in state.tensors["masters"].values()])
        for _, state in (alone, middle, later)
    ]
    apart, moved = (ends[0] - ends[2]).abs(), (ends[1] - ends[2]).abs()
    assert apart.max() < 1e-6 < moved.median()
