"""Decoding, verdicts, the engine and both kinds of training step on every device, in both precisions.

    python -m pytest -m gpu tests/policy        # where a GPU is; needs neither Ray nor vLLM nor FAISS

Compared with float32 on the CPU, of the same weights: those of bfloat16 are rounded before.
"""

import copy

import numpy as np
import pytest
import torch
from worlds import SEMANTIC_IDS, TRIE, fhr_at_1, prompts_of, tiny_config, tiny_data, tiny_model

from conrec.blocklist.engines import TorchEngine
from conrec.policy.decoding import DeviceTrie, completion_log_probs, pair_verdicts, sample_without_replacement
from conrec.policy.loop import TrainingLoop
from conrec.ragged import Ragged

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of log-probabilities and verdicts. Both are computed in float32; in bfloat16 the hidden states are rounded."""

pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]),
    pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"]),
]


def models(device, dtype):
    """(the model, the same weights in float32 on the CPU, vocabulary)."""
    model, _, vocabulary = tiny_model(tiny_config())
    model = model.eval().to(dtype)
    return model.to(device), copy.deepcopy(model).cpu().float(), vocabulary


def close(found, wanted, dtype):
    torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_log_probabilities_and_their_gradient_are_those_of_float32_on_the_cpu(device, dtype):
    model, plain, vocabulary = models(device, dtype)
    prompts, leaves = prompts_of(np.arange(3), vocabulary), torch.tensor([[0, 6, 3], [2, 4, 15], [9, -1, -1]])
    totals = []
    for one in (model, plain):
        log_probs, entropies = completion_log_probs(
            one, prompts, leaves.to(one.device), DeviceTrie(TRIE, vocabulary, one.device)
        )
        assert log_probs.dtype == entropies.dtype == torch.float32
        log_probs.sum().backward()
        totals.append((log_probs.detach(), entropies.detach()))
    for found, wanted in zip(*totals, strict=True):
        close(found, wanted, dtype)
    found, wanted = (one.get_output_embeddings().weight.grad.float().cpu() for one in (model, plain))
    assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_draws_are_those_of_their_seeds(device, dtype):
    """Which leaves a seed draws does not hang on the device; in bfloat16 a near tie may fall the other way."""
    model, plain, vocabulary = models(device, dtype)
    prompts, seeds = prompts_of(np.arange(12) % 4, vocabulary), np.random.default_rng(0).integers(1 << 62, size=12)
    drawn = [
        sample_without_replacement(one, prompts, DeviceTrie(TRIE, vocabulary, one.device), 6, seeds)
        for one in (model, plain)
    ]
    (leaves, log_probs), (wanted, wanted_log_probs) = drawn
    assert log_probs.dtype == torch.float32 and torch.isfinite(log_probs).all()
    assert all(len(set(row)) == 6 and min(row) >= 0 for row in leaves.tolist())
    same = leaves.cpu() == wanted
    assert same.all() if dtype == torch.float32 else same.float().mean() > 0.8
    close(log_probs.cpu()[same], wanted_log_probs[same], dtype)


def test_the_engine_finds_and_judges_as_float32_on_the_cpu(device, dtype):
    """All leaves are beams, so that the search is exact and no order of near ties matters."""
    model, plain, vocabulary = models(device, dtype)
    prompts, given = prompts_of(np.arange(4), vocabulary), np.tile(np.arange(len(TRIE)), (4, 1))
    engine, reference = TorchEngine(model, TRIE, vocabulary), TorchEngine(plain, TRIE, vocabulary)
    scores, judged = (torch.from_numpy(one) for one in reference.score_and_judge(prompts, given))
    leaves, log_probs, verdicts = (torch.from_numpy(one) for one in engine.generate_and_judge(prompts, len(TRIE)))
    assert log_probs.dtype == verdicts.dtype == torch.float32
    close(log_probs, scores.gather(1, leaves), dtype)
    close(verdicts, judged.gather(1, leaves), dtype)
    for found, wanted in zip(engine.score_and_judge(prompts, given), (scores, judged), strict=True):
        close(torch.from_numpy(found), wanted, dtype)
    pairs = Ragged.from_lengths(given.ravel(), np.full(4, len(TRIE)))
    close(torch.from_numpy(pair_verdicts(model, prompts, pairs, engine.trie)), judged.ravel(), dtype)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["grpo", "s_dpo"])
def test_a_training_takes_its_steps_and_learns(device, dtype, objective):
    stage = {"name": "all", "blocks": ["negatives"], "steps": 3, "beta": 0.5, "objective": objective}
    config = tiny_config(
        grpo={"stages": [stage], "evaluate_every": 3}, supervised={"warmup_epochs": 8, "event_dropout": 0.0}
    )
    model, _, vocabulary = models(device, dtype)
    rows = []
    TrainingLoop(
        model,
        tiny_data(config, vocabulary),
        DeviceTrie(TRIE, vocabulary, device),
        torch.eye(len(SEMANTIC_IDS)),
        torch.from_numpy(TRIE.semantic_ids),
        config,
        fhr_at_1,
        rows.append,
        lambda state: None,
    ).run()
    losses = {
        phase: [row["loss"] for row in rows if row["phase"] == phase and "loss" in row] for phase in ("warm_up", "all")
    }
    assert np.isfinite([*losses["warm_up"], *losses["all"]]).all() and len(losses["all"]) == 3
    assert losses["warm_up"][-1] < 0.8 * losses["warm_up"][0]
    assert any("verdict_auc" in row for row in rows)
