"""The loop learns a known aversion, rejects a stage that makes things worse, and resumes where it was killed."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from worlds import (
    KINDS,
    LEVELS,
    SEMANTIC_IDS,
    TRIE,
    VALIDATED,
    fhr_at_1,
    leaves_of,
    prompts_of,
    tiny_config,
    tiny_data,
    tiny_model,
)

from conrec.errors import ConfigError
from conrec.policy.decoding import DeviceTrie, completion_log_probs, pair_verdicts
from conrec.policy.loop import LoopState, TrainingLoop
from conrec.policy.model import put_tensors, trainable
from conrec.policy.prompts import CACHE_BLOCK
from conrec.policy.samples import JudgedPairs
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged

pytestmark = pytest.mark.long

STAGE = {"name": "all", "blocks": ["negatives", "positives"], "steps": 100, "beta": 0.02}
VECTORS = np.eye(len(SEMANTIC_IDS), dtype=np.float32)


def run(config, evaluate=fhr_at_1, state=None, checkpoint=lambda state: None, model=None, change=lambda data: data):
    fresh, _, vocabulary = tiny_model(config)
    model = model or fresh
    rows = []
    loop = TrainingLoop(
        model,
        change(tiny_data(config, vocabulary)),
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


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run to its end, and what it left at every checkpoint."""

    model: torch.nn.Module
    vocabulary: Vocabulary
    rows: list[dict]
    saved: list[tuple[dict, LoopState]]


CONFIG = tiny_config(train={"checkpoint_every": 25, "cpus_per_worker": 1})


@pytest.fixture(scope="module")
def whole():
    """Both halves, undisturbed. Only read."""
    saved = []
    model, _, _ = tiny_model(CONFIG)

    def checkpoint(state):
        json.dumps({name: value for name, value in vars(state).items() if name != "tensors"})
        saved.append((copy.deepcopy(model.state_dict()), copy.deepcopy(state)))

    return Trained(*run(CONFIG, model=model, checkpoint=checkpoint), saved)


@pytest.fixture(scope="module")
def supervised():
    """The first half alone. Only read."""
    return run(tiny_config(grpo={"stages": []}))[0]


def without_validation(data):
    none = np.zeros(0, np.int64)
    pairs = JudgedPairs(data.pairs.leaves.take(none), np.zeros(0, bool))
    return dataclasses.replace(data, validation=data.validation.take(none), validation_users=none, pairs=pairs)


def probability_of_the_right_one(model, vocabulary):
    kinds = np.arange(KINDS)
    leaves = torch.from_numpy(leaves_of(kinds, 3))[:, None]
    log_probs, _ = completion_log_probs(model, prompts_of(kinds, vocabulary), leaves, DeviceTrie(TRIE, vocabulary))
    return log_probs.sum(-1).exp().mean().item()


def test_grpo_raises_the_reward_and_the_probability_of_what_will_be_rejected(whole, supervised):
    rewards = [row["reward"] for row in whole.rows if "reward" in row]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:20]) + 0.05
    before, after = (probability_of_the_right_one(model, whole.vocabulary) for model in (supervised, whole.model))
    assert after > 3 * before
    verdict = next(row for row in whole.rows if "stage_accepted" in row)
    assert verdict["stage_accepted"] and verdict["after_fhr"] > verdict["before_fhr"]


def test_the_best_step_trained_alone_and_unmeasured_is_the_best_state():
    """What a refit does: nobody is asked, the steps that were chosen are taken."""
    figures = iter([0.2, 0.9, *[0.1] * 50])
    config = tiny_config()
    best, _, rows = run(config, evaluate=lambda leaves: {"fhr": 1.0, "fph": 1 - next(figures)})
    verdict = next(row for row in rows if "stage_accepted" in row)
    assert verdict["best_step"] == config.grpo.evaluate_every
    stage = config.grpo.stages[0].model_copy(update={"steps": verdict["best_step"]})
    short = config.model_copy(update={"grpo": config.grpo.model_copy(update={"stages": (stage,)})})
    again, _, rows = run(short, evaluate=None, change=without_validation)
    assert not any("stage_accepted" in row for row in rows)
    for name, value in best.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_a_stage_that_does_not_help_is_dropped(supervised):
    falling = iter(np.linspace(1.0, 0.1, 50))
    after, _, rows = run(tiny_config(), evaluate=lambda leaves: {"fhr": next(falling), "fph": 0.1})
    assert not next(row for row in rows if "stage_accepted" in row)["stage_accepted"]
    for name, value in supervised.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0)


def test_a_rivals_stage_stands_at_its_best_measurement_however_much_it_lost(supervised):
    """Where nothing may be rejected a stage that loses in every measurement is not the policy that it began from, nor
    is its best the one in which a single anchor of 16 was hit, by chance on the side of what was rejected."""
    stage = {**STAGE, "steps": 30, "objective": "s_dpo", "name": "preferences"}
    readings = iter([(1.0, 1.0), (0.2, 1.0), (0.5, 1.0), (1 / VALIDATED, 0.0)])
    config = tiny_config(grpo={"stages": [stage], "evaluate_every": 10, "tolerance": 1.0})
    after, _, rows = run(config, evaluate=lambda leaves: dict(zip(("fhr", "fph"), next(readings), strict=True)))
    verdict = next(row for row in rows if "stage_accepted" in row)
    assert verdict["stage_accepted"] and verdict["best_step"] == 20 and verdict["after_fhr"] == 0.5
    assert any(not torch.equal(after.state_dict()[name], value) for name, value in supervised.state_dict().items())


@pytest.mark.parametrize("stop_at", [0, 2])
def test_a_resumed_run_ends_like_an_undisturbed_one(whole, stop_at):
    weights, state = copy.deepcopy(whole.saved[stop_at])
    resumed, _, _ = tiny_model(CONFIG)
    resumed.load_state_dict(weights)
    run(CONFIG, model=resumed, state=state)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert len(state.rows) == len(whole.rows)
    measured = ("verdict_auc", "alignment_accuracy", "loss")
    for again, row in zip(state.rows, whole.rows, strict=True):
        assert again.keys() == row.keys() and again["phase"] == row["phase"]
        assert {name: again[name] for name in measured if name in row} == pytest.approx(
            {name: row[name] for name in measured if name in row}, rel=1e-4, abs=1e-6
        )


def test_a_resumed_run_computes_as_much_at_once_as_one_that_begins(whole, monkeypatch):
    """What a checkpoint held is counted among what is to come: it must not lie on the device by then."""
    _, state = copy.deepcopy(whole.saved[2])
    held, asked = state.tensors, []

    def training_positions(*given):
        asked.append(state.tensors is held)
        # The tokens of an example end with an ID and its kind.
        assert given[-1] == CACHE_BLOCK + LEVELS + 1
        return 8192

    monkeypatch.setattr("conrec.policy.loop.training_positions", training_positions)
    config = CONFIG.model_copy(update={"grpo": CONFIG.grpo.model_copy(update={"stages": ()})})
    state.phase = 1
    run(config, state=state)
    assert held["reference"] and held["optimiser"] and asked == [True]
    # A number that the settings name is taken as it is.
    named = config.model_copy(update={"train": config.train.model_copy(update={"tokens_at_once": 1200})})
    run(named, state=LoopState(phase=1))
    assert asked == [True]


def test_dropout_of_a_step_is_that_of_its_seed():
    """Of attention and of events: another state of the global generator changes nothing, another seed does."""
    weights = []
    for disturbed, seed in ((0, 0), (17, 0), (0, 1)):
        config = tiny_config(grpo={"stages": []}, supervised={"warmup_epochs": 2}, seed=seed)
        model, _, _ = tiny_model(tiny_config())
        torch.manual_seed(disturbed)
        weights.append(run(config, model=model)[0].lm_head.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dropped", ["event_dropout", "attention_dropout"])
def test_both_kinds_of_dropout_are_on_in_the_warm_up_and_can_be_turned_off(dropped):
    section = "supervised" if dropped == "event_dropout" else "model"
    losses = []
    for share in (0.0, 0.4):
        off = {"supervised": {"warmup_epochs": 1, "event_dropout": 0.0}, "model": {"attention_dropout": 0.0}}
        off[section][dropped] = share
        _, _, rows = run(tiny_config(grpo={"stages": []}, **off))
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] != losses[1]


def test_a_step_whose_events_are_all_dropped_teaches_nothing(monkeypatch):
    monkeypatch.setattr("conrec.policy.loop.WEIGHT_DECAY", 0.0)
    quiet = {"warmup_epochs": 1, "event_dropout": 0.999999}
    untaught, _, rows = run(tiny_config(grpo={"stages": []}, supervised=quiet))
    assert [row["loss"] for row in rows if "loss" in row] == [0.0] * len([row for row in rows if "loss" in row])
    before, _, _ = tiny_model(tiny_config())
    for name, value in before.state_dict().items():
        torch.testing.assert_close(untaught.state_dict()[name], value, rtol=0, atol=0)


def test_only_phases_that_the_data_has_are_run():
    """Supervised training and GRPO are two runs of one configuration, the second from the tensors of the first."""
    config = tiny_config(supervised={"warmup_epochs": 1}, grpo={"stages": [STAGE | {"steps": 2}]})
    supervised, vocabulary, rows = run(config, change=lambda data: dataclasses.replace(data, stages={}))
    assert {row["phase"] for row in rows} == {"warm_up"}
    trained = {name: tensor.detach().clone() for name, tensor in trainable(supervised).items()}
    model, _, _ = tiny_model(config)
    put_tensors(model, trained)
    falling = iter([0.9, 0.1])
    tuned, _, rows = run(
        config,
        model=model,
        change=lambda data: dataclasses.replace(data, tasks={}),
        evaluate=lambda leaves: {"fhr": next(falling), "fph": 0.1},
    )
    assert {row["phase"] for row in rows} == {"all"}
    # The stage is rejected, and what it falls back to are the tensors that it was given.
    for name, tensor in trainable(tuned).items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=0)
    assert probability_of_the_right_one(tuned, vocabulary) == probability_of_the_right_one(supervised, vocabulary)


def test_the_first_grpo_step_sees_no_divergence_however_much_dropout_there_is():
    """The policy is compared with itself: dropout in one of the two passes would look like a divergence."""
    config = tiny_config(
        model={"attention_dropout": 0.5},
        supervised={"warmup_epochs": 2},
        grpo={"stages": [STAGE | {"steps": 3}], "evaluate_every": 1},
    )
    _, _, rows = run(config)
    divergences = [row["kl"] for row in rows if "kl" in row]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[-1] > 1e-4
    assert [row["kl"] for row in run(config)[2] if "kl" in row] == divergences


def plain_auc(verdicts, rejected):
    """Pair by pair."""
    pairs = [(one, other) for one in verdicts[rejected] for other in verdicts[~rejected]]
    return sum((one > other) + 0.5 * (one == other) for one, other in pairs) / len(pairs)


def test_the_auc_counts_pairs_in_order_and_equal_ones_half():
    random = np.random.default_rng(0)
    for _ in range(20):
        rejected = np.r_[True, False, random.random(30) < 0.4]
        verdicts = random.integers(0, 6, 32).astype(np.float32)
        pairs = JudgedPairs(Ragged.from_lengths(np.arange(32), np.array([0, 20, 12])), rejected)
        assert pairs.auc(verdicts) == pytest.approx(plain_auc(verdicts, rejected), abs=1e-12)
    for one_sided in (np.ones(3, bool), np.zeros(3, bool), np.zeros(0, bool)):
        pairs = JudgedPairs(Ragged.from_lengths(np.arange(len(one_sided)), np.array([len(one_sided)])), one_sided)
        assert pairs.auc(np.zeros(len(one_sided))) is None
    pairs = JudgedPairs(Ragged.from_lengths(np.arange(3), np.array([3])), np.array([True, False, False]))
    assert np.isnan(pairs.auc(np.array([1, np.nan, 2])))


def test_the_verdict_is_learned_in_the_warm_up_and_measured_after_every_phase():
    long = {"warmup_epochs": 150, "event_dropout": 0.0}
    model, vocabulary, rows = run(tiny_config(supervised=long, grpo={"stages": [STAGE | {"steps": 5}]}))
    found = {row["phase"]: row["verdict_auc"] for row in rows if "verdict_auc" in row}
    assert list(found) == ["warm_up", "all"]
    assert found["warm_up"] > 0.9
    data = tiny_data(tiny_config(), vocabulary)
    # What the last row says is what a forward of its own for every pair says of the model that is left.
    verdicts = []
    for row, leaf in zip(data.pairs.leaves.rows, data.pairs.leaves.values, strict=True):
        codes = vocabulary.code_tokens(TRIE.semantic_ids[leaf])
        tokens = torch.tensor([[*data.validation[row].tolist(), *codes.tolist()]])
        with torch.no_grad():
            log_probs = model(tokens).logits[0, -1].log_softmax(-1)
        verdicts.append((log_probs[vocabulary.rejected] - log_probs[vocabulary.liked]).item())
    assert found["all"] == pytest.approx(plain_auc(np.array(verdicts), data.pairs.rejected))
    _, _, rows = run(tiny_config(supervised={"warmup_epochs": 1}, grpo={"stages": []}), change=without_validation)
    assert not any("verdict_auc" in row for row in rows)


def judge(worker, workers, folder):
    """One worker's verdict on the anchors of the fresh model, and how many prompts it read for it."""
    if workers > 1:
        distributed.init_process_group("gloo", f"file://{folder}/meet", rank=worker, world_size=workers)
    read = []

    def counted(model, prompts, *given):
        read.append(len(prompts))
        return pair_verdicts(model, prompts, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conrec.policy.loop.pair_verdicts", counted)
        # The verdict of an untrained model, of an odd number of anchors with different numbers of pairs.
        config = tiny_config(supervised={"warmup_epochs": 0}, grpo={"stages": [STAGE | {"steps": 1}]})
        rows = run(config, change=lambda data: dataclasses.replace(data, **uneven(data)))[2]
    auc = [row["verdict_auc"] for row in rows if "verdict_auc" in row]
    Path(folder, f"{workers}-{worker}").write_text(json.dumps([read, auc]))
    if workers > 1:
        distributed.destroy_process_group()


def uneven(data):
    anchors = np.arange(VALIDATED - 1)
    pairs, rows = data.pairs, data.pairs.leaves.rows
    kept = (rows < len(anchors)) & (np.arange(len(rows)) % 5 != 0)
    leaves = Ragged.from_rows(rows[kept], pairs.leaves.values[kept], len(anchors))
    return {
        "tasks": {},
        "validation": data.validation.take(anchors),
        "validation_users": anchors,
        "pairs": JudgedPairs(leaves, pairs.rejected[kept]),
    }


def test_workers_share_out_the_anchors_whose_pairs_are_judged(tmp_path, monkeypatch):
    """One that judged all of them alone would let the others wait for longer than a collective does."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    judge(0, 1, tmp_path)
    multiprocessing.spawn(judge, (2, str(tmp_path)), 2)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    assert (one[0], first[0], second[0]) == ([15], [8], [7])
    # Rows are the first worker's.
    assert second[1] == [] and first[1] == pytest.approx(one[1], abs=1e-6) and len(one[1]) == 1


@pytest.mark.parametrize("half", ["supervised", "grpo"])
def test_a_training_that_diverges_ends_with_its_setting_and_keeps_nothing(half):
    """One weight that is no number makes the first gradient none, as a step that was too large would."""
    stage = {**STAGE, "objective": "s_dpo", "name": "preferences"}
    config = tiny_config(train={"checkpoint_every": 1}, grpo={"stages": [stage]})
    model, _, _ = tiny_model(config)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    kept = []
    left_out = {"supervised": "stages", "grpo": "tasks"}[half]
    phase = {"supervised": "warm_up", "grpo": "preferences"}[half]
    with pytest.raises(ConfigError, match=rf"in step 1 of {phase} the gradient's norm is nan; lower {half}.learning_r"):
        run(
            config,
            model=model,
            checkpoint=kept.append,
            change=lambda data: dataclasses.replace(without_validation(data), **{left_out: {}}),
        )
    assert kept == []


def test_every_row_has_the_figures_that_are_watched(whole):
    step = next(row for row in whole.rows if "reward" in row)
    wanted = {"loss", "reward", "reward_gain", "reward_penalty", "kl", "entropy", "groups_without_variance"}
    assert wanted | {"most_frequent_share", "tokens_per_second"} <= step.keys()
    assert any("alignment_accuracy" in row for row in whole.rows)
