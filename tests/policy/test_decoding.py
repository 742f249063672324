"""Constrained decoding against plain references: one full forward per candidate, a masked softmax by dictionary."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conrec.catalogue.trie import Trie
from conrec.errors import ArtefactError
from conrec.policy.decoding import (
    DeviceTrie,
    _exponential,
    _pair_batches,
    beam_search,
    completion_log_probs,
    judged_beam_search,
    judged_log_probs,
    length_batches,
    pair_verdicts,
    sample_without_replacement,
    step_log_probs,
    traced_samples,
    verdicts,
)
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged

LEVELS, CODES, FIRST = 3, 5, 10
VOCABULARY = Vocabulary(LEVELS, CODES, FIRST, *range(8))
SIZES = {
    "vocab_size": FIRST + LEVELS * CODES + 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Far from uniform, so that orders are clear of float ties.
    "initializer_range": 0.4,
}
SEMANTIC_IDS = np.array([[0, 0, 1], [0, 0, 4], [0, 3, 1], [2, 3, 1], [2, 3, 3], [2, 1, 0], [4, 4, 4]])


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


MODEL = tiny_model()


def rows(*lengths: int, seed: int = 0) -> Ragged:
    values = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], sum(lengths)).astype(np.int32)
    return Ragged.from_lengths(values, np.array(lengths))


def device_trie(semantic_ids: np.ndarray = SEMANTIC_IDS) -> DeviceTrie:
    return DeviceTrie(Trie.build(semantic_ids, CODES), VOCABULARY)


def next_log_probs(
    model: torch.nn.Module, prompt: np.ndarray, prefix: tuple[int, ...], ids: set
) -> dict[int, torch.Tensor]:
    """Plain reference: allowed code -> log-probability after prompt and prefix."""
    level = len(prefix)
    tokens = [*prompt.tolist(), *(FIRST + at * CODES + code for at, code in enumerate(prefix))]
    logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
    allowed = sorted({semantic_id[level] for semantic_id in ids if semantic_id[:level] == prefix})
    chosen = torch.stack([logits[FIRST + level * CODES + code] for code in allowed])
    return dict(zip(allowed, chosen - chosen.logsumexp(0), strict=True))


def token_log_probs(model: torch.nn.Module, prompt: np.ndarray, semantic_id: tuple, ids: set) -> list[torch.Tensor]:
    return [next_log_probs(model, prompt, semantic_id[:at], ids)[semantic_id[at]] for at in range(LEVELS)]


def exhaustive(model: torch.nn.Module, prompt: np.ndarray, semantic_ids: np.ndarray) -> np.ndarray:
    """Log-probability of every leaf, in leaf order."""
    ids = {tuple(row) for row in semantic_ids.tolist()}
    with torch.no_grad():
        return np.array([sum(token_log_probs(model, prompt, one, ids)).item() for one in sorted(ids)])


def reference_beams(model: torch.nn.Module, prompt: np.ndarray, semantic_ids: np.ndarray, width: int) -> list[tuple]:
    ids = {tuple(row) for row in semantic_ids.tolist()}
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(LEVELS):
        grown = [
            ((*prefix, code), score + step.item())
            for prefix, score in beams
            for code, step in next_log_probs(model, prompt, prefix, ids).items()
        ]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return beams


catalogues = st.lists(st.tuples(*[st.integers(0, CODES - 1)] * LEVELS), min_size=1, max_size=25, unique=True).map(
    np.array
)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(catalogues, lengths, st.integers(1, 30), st.integers(0, 9))
def test_generated_ids_exist_and_are_distinct(
    semantic_ids: np.ndarray, lengths: list[int], width: int, seed: int
) -> None:
    trie = device_trie(semantic_ids)
    prompts = rows(*lengths, seed=seed)
    drawn = sample_without_replacement(MODEL, prompts, trie, width, seeds_of(len(prompts), seed))
    for leaves, log_probs in (beam_search(MODEL, prompts, trie, width), drawn):
        found = min(width, len(semantic_ids))
        assert leaves.shape == log_probs.shape == (len(lengths), width)
        assert ((leaves[:, :found] >= 0) & (leaves[:, :found] < len(semantic_ids))).all()
        assert (leaves[:, found:] == -1).all() and (log_probs[:, found:] == -torch.inf).all()
        assert all(len(set(row[:found])) == found for row in leaves.tolist())


@settings(max_examples=15, deadline=None)
@given(catalogues, st.integers(1, 9), st.integers(0, 9))
def test_probabilities_of_all_leaves_sum_to_one(semantic_ids: np.ndarray, length: int, seed: int) -> None:
    _, log_probs = beam_search(MODEL, rows(length, seed=seed), device_trie(semantic_ids), len(semantic_ids))
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)


@settings(max_examples=10, deadline=None)
@given(catalogues, st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 9))
def test_wide_beams_equal_exhaustive_scoring(semantic_ids: np.ndarray, lengths: list[int], seed: int) -> None:
    prompts = rows(*lengths, seed=seed)
    leaves, log_probs = beam_search(MODEL, prompts, device_trie(semantic_ids), len(semantic_ids) + 2)
    for row in range(len(prompts)):
        expected = exhaustive(MODEL, prompts[row], semantic_ids)
        found = leaves[row, : len(expected)].numpy()
        np.testing.assert_allclose(log_probs[row, : len(expected)].numpy(), expected[found], atol=1e-4)
        assert (np.diff(log_probs[row, : len(expected)].numpy()) <= 0).all()
        assert sorted(found) == list(range(len(expected)))


@settings(max_examples=8, deadline=None)
@given(catalogues, st.integers(1, 6), st.integers(0, 9))
def test_narrow_beams_equal_plain_beam_search(semantic_ids: np.ndarray, width: int, seed: int) -> None:
    prompts = rows(4, 7, seed=seed)
    trie = Trie.build(semantic_ids, CODES)
    leaves, log_probs = beam_search(MODEL, prompts, DeviceTrie(trie, VOCABULARY), width)
    for row in range(2):
        with torch.no_grad():
            expected = reference_beams(MODEL, prompts[row], semantic_ids, width)
        assert [tuple(one) for one in trie.semantic_ids[leaves[row, : len(expected)].numpy()].tolist()] == [
            prefix for prefix, _ in expected
        ]
        np.testing.assert_allclose(log_probs[row, : len(expected)].numpy(), [score for _, score in expected], atol=1e-4)


def test_allowed_sets_follow_the_full_prefix() -> None:
    # Code 3 of level 1 follows both 0 and 2; what may follow it depends on which.
    trie = device_trie()
    tokens, nodes, real = trie.children(0, torch.zeros(1, dtype=torch.int64))
    assert (tokens[real] - FIRST).tolist() == [0, 2, 4]
    second, grandchildren, real = trie.children(1, nodes[0, :2])
    assert [(second[at][real[at]] - FIRST - CODES).tolist() for at in range(2)] == [[0, 3], [1, 3]]
    third, leaves, real = trie.children(2, torch.stack([grandchildren[0, 1], grandchildren[1, 1]]))
    assert [(third[at][real[at]] - FIRST - 2 * CODES).tolist() for at in range(2)] == [[1], [1, 3]]
    assert leaves[real].tolist() == [2, 4, 5]


def test_children_outside_the_trie_have_no_probability() -> None:
    trie = device_trie()
    step = step_log_probs(torch.zeros(2, CODES), torch.tensor([0, 1]), 1, trie)
    torch.testing.assert_close(step.exp(), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    last = step_log_probs(torch.zeros(2, CODES), torch.tensor([0, 1]), 2, trie)
    torch.testing.assert_close(last.exp(), torch.tensor([[0.5, 0.5], [1.0, 0.0]]))


def test_empty_allowed_set_is_refused() -> None:
    trie = Trie.build(SEMANTIC_IDS, CODES)
    offsets = list(trie.child_offsets)
    offsets[1] = offsets[1].copy()
    offsets[1][1] = 0
    broken = Trie(LEVELS, CODES, trie.semantic_ids, tuple(offsets), trie.child_codes, trie.item_leaves, trie.leaf_items)
    with pytest.raises(ArtefactError, match="no code after node 0 of level 1"):
        DeviceTrie(broken, VOCABULARY)


def test_catalogue_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ArtefactError, match="3 levels of 6 codes"):
        DeviceTrie(Trie.build(SEMANTIC_IDS, CODES + 1), VOCABULARY)


def test_generation_settings_of_the_checkpoint_are_ignored() -> None:
    model = tiny_model()
    expected = beam_search(model, rows(6), device_trie(), 7)
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.01, temperature=9.0)
    found = beam_search(model, rows(6), device_trie(), 7)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_order_and_size_of_batches_do_not_matter(batch_tokens: int) -> None:
    prompts, trie = rows(3, 9, 1, 6, 9, 2), device_trie()
    leaves, log_probs = beam_search(MODEL, prompts, trie, 5)
    order = np.array([4, 0, 5, 2, 1, 3])
    again, shuffled = beam_search(MODEL, prompts.take(order), trie, 5, batch_tokens)
    assert torch.equal(again, leaves[order])
    torch.testing.assert_close(shuffled, log_probs[order], atol=1e-5, rtol=1e-5)


def test_length_batches_cover_every_row_once_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    batches = list(length_batches(lengths, 4, 120))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all(len(rows) == 1 or (lengths[rows].max() + 4) * len(rows) <= 120 for rows in batches)
    # Nor is there much padding in a batch, however many rows would fit.
    batches = list(length_batches(lengths, 4, 3200))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert all((lengths[rows].max() - lengths[rows]).sum() <= 50 for rows in batches) and 1 < len(batches) < 60


def test_batches_of_pairs_hold_the_budget_where_long_prompts_have_few_pairs() -> None:
    prompts, completions = np.array([480, 32, 33, 470]), np.array([3, 450, 449, 12])
    assert len(list(length_batches(prompts + completions, 0, 1940))) == 1
    batches = list(_pair_batches(prompts, completions, 1940))
    assert [set(rows) for rows in batches] == [{0, 3}, {1, 2}]
    random = np.random.default_rng(0)
    prompts, completions = 32 * random.integers(1, 15, 300), 3 * random.integers(0, 50, 300)
    batches = list(_pair_batches(prompts, completions, 1000))
    assert sorted(np.concatenate(batches)) == list(range(300)) and len(batches) < 200
    assert all(len(rows) * (prompts[rows].max() + completions[rows].max()) <= 1000 for rows in batches)
    # What fits stays together as it was, and one row of any length is a batch.
    alike = [rows.tolist() for rows in _pair_batches(np.full(6, 32), np.arange(6), 100)]
    assert alike == [rows.tolist() for rows in length_batches(32 + np.arange(6), 0, 100)]
    assert [rows.tolist() for rows in _pair_batches(np.array([9]), np.array([9]), 1)] == [[0]]


def test_sampling_without_replacement_has_the_exact_distribution() -> None:
    # 6,000 draws of ordered pairs from 7 leaves against p_i p_j / (1 - p_i): chi-square with 41 degrees of freedom.
    prompt, draws = rows(5, seed=3), 6000
    probabilities = np.exp(exhaustive(MODEL, prompt[0], SEMANTIC_IDS))
    probabilities /= probabilities.sum()
    many = prompt.take(np.zeros(draws, np.int64))
    leaves, _ = sample_without_replacement(MODEL, many, device_trie(), 2, seeds_of(draws, 5))
    pairs, counts = np.unique(leaves.numpy(), axis=0, return_counts=True)
    seen = dict(zip(map(tuple, pairs.tolist()), counts, strict=True))
    expected = {
        (i, j): draws * probabilities[i] * probabilities[j] / (1 - probabilities[i])
        for i, j in permutations(range(7), 2)
    }
    common = [pair for pair, count in expected.items() if count >= 5]
    rare = draws - sum(expected[pair] for pair in common)
    statistic = sum((seen.get(pair, 0) - expected[pair]) ** 2 / expected[pair] for pair in common)
    rare_seen = draws - sum(seen.get(pair, 0) for pair in common)
    assert len(common) > 15
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5
    assert abs(rare_seen - rare) < 5 * max(rare, 1) ** 0.5


def seeds_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1 << 62, size=count)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_what_a_prompt_draws_follows_from_its_seed_alone(batch_tokens: int) -> None:
    """In any batch, any order, and where another prompt is missing."""
    prompts, trie, seeds = rows(3, 9, 1, 6, 9, 2), device_trie(), seeds_of(6, 0)
    leaves, _ = sample_without_replacement(MODEL, prompts, trie, 4, seeds)
    order = np.array([4, 0, 5, 2, 3])
    again, _ = sample_without_replacement(MODEL, prompts.take(order), trie, 4, seeds[order], batch_tokens)
    assert torch.equal(again, leaves[order])
    other, _ = sample_without_replacement(MODEL, prompts, trie, 4, seeds_of(6, 1))
    assert not torch.equal(other, leaves)


def test_sampled_log_probs_are_those_of_the_model() -> None:
    prompts = rows(4, 8)
    leaves, log_probs = sample_without_replacement(MODEL, prompts, device_trie(), 4, seeds_of(2, 0))
    for row in range(2):
        expected = exhaustive(MODEL, prompts[row], SEMANTIC_IDS)[leaves[row].numpy()]
        np.testing.assert_allclose(log_probs[row].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("seed", "level"), [(4375518, 0), (3747935, 1)])
def test_the_largest_uniform_draws_as_any_other(seed: int, level: int) -> None:
    """One draw in 2^24 has all its bits; these seeds have it at the first node of a level."""
    trie, seeds = device_trie(), np.full(2, seed)
    noise = _exponential(seeds, torch.zeros(2, 1, 1, dtype=torch.long), level, trie)
    assert 0 < float(noise.max()) < 1e-7
    leaves, log_probs = sample_without_replacement(MODEL, rows(4, 8), trie, 7, seeds)
    assert leaves.sort(dim=1).values.tolist() == [list(range(7))] * 2
    assert log_probs.isfinite().all()


def lora_model() -> torch.nn.Module:
    tokens = list(range(FIRST, FIRST + LEVELS * CODES))
    config = LoraConfig(
        r=2, target_modules="all-linear", trainable_token_indices={"embed_tokens": tokens, "lm_head": tokens}
    )
    model = get_peft_model(tiny_model(1), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def checkpointed_model() -> torch.nn.Module:
    model = tiny_model(1)
    model.gradient_checkpointing_enable()
    return model.train()


def qwen_model() -> torch.nn.Module:
    torch.manual_seed(4)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)).eval()


def eager_model() -> torch.nn.Module:
    torch.manual_seed(4)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation="eager").eval()


@pytest.mark.parametrize("group_size", [4, 9])
@pytest.mark.parametrize("build", [tiny_model, lora_model, qwen_model, eager_model])
def test_traced_samples_are_the_samples_with_the_packed_figures_and_gradient(
    build: Callable[[], torch.nn.Module], group_size: int
) -> None:
    """1e-5, gradients 1e-4; also where the group is larger than the trie."""
    model, trie, prompts, seeds = build(), device_trie(), rows(2, 7, 5), seeds_of(3, 0)
    leaves, steps, entropies = traced_samples(model, prompts, trie, group_size, seeds)
    drawn, totals = sample_without_replacement(model, prompts, trie, group_size, seeds)
    assert torch.equal(leaves, drawn)
    torch.testing.assert_close(steps.sum(-1)[leaves >= 0], totals[leaves >= 0], atol=1e-5, rtol=1e-5)
    plain, plain_entropies = completion_log_probs(model, prompts, leaves, trie)
    torch.testing.assert_close(steps, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, plain_entropies, atol=1e-5, rtol=1e-5)
    weights = torch.randn(steps.shape, generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = [(steps, entropies), (plain, plain_entropies)]
    found, wanted = (torch.autograd.grad((one * weights).sum() + 0.3 * other.sum(), trained) for one, other in pairs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("build", [tiny_model, lora_model, checkpointed_model, qwen_model, eager_model])
def test_packed_forward_and_gradient_equal_the_plain_ones(build: Callable[[], torch.nn.Module]) -> None:
    model, trie, prompts = build(), device_trie(), rows(2, 7, 5)
    leaves = torch.tensor([[0, 6, 3, 1], [2, 4, 5, 0], [6, 5, -1, -1]])
    real = leaves >= 0
    weights = torch.randn(3, 4, LEVELS, generator=torch.Generator().manual_seed(0)) * real[..., None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    log_probs, entropies = completion_log_probs(model, prompts, leaves, trie)
    gradients = torch.autograd.grad((log_probs * weights).sum() + 0.3 * entropies.sum(), trained)

    ids = {tuple(row) for row in SEMANTIC_IDS.tolist()}
    expected, entropy = torch.zeros(3, 4, LEVELS), torch.zeros(3, 4, LEVELS)
    for row, at in real.nonzero().tolist():
        semantic_id = sorted(ids)[leaves[row, at]]
        for level in range(LEVELS):
            step = next_log_probs(model, prompts[row], semantic_id[:level], ids)
            expected[row, at, level] = step[semantic_id[level]]
            entropy[row, at, level] = -sum(one.exp() * one for one in step.values())
    plain = torch.autograd.grad((expected * weights).sum() + 0.3 * entropy.sum(), trained)

    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropies, entropy, atol=1e-4, rtol=1e-4)
    # Without a gradient in two passes: the prompts, then what follows them.
    with torch.no_grad():
        again = completion_log_probs(model, prompts, leaves, trie)
    torch.testing.assert_close(again, (log_probs.detach(), entropies.detach()), atol=1e-5, rtol=1e-5)
    for found, wanted in zip(gradients, plain, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    wide, _ = beam_search(model, prompts, trie, 7)
    assert all(sorted(row) == list(range(7)) for row in wide.tolist())


def plain_verdict(model: torch.nn.Module, prompt: np.ndarray, semantic_id: np.ndarray) -> torch.Tensor:
    """From the whole softmax after prompt and ID, a forward of its own."""
    tokens = [*prompt.tolist(), *VOCABULARY.code_tokens(semantic_id).tolist()]
    log_probs = model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
    return log_probs[VOCABULARY.rejected] - log_probs[VOCABULARY.liked]


@pytest.mark.parametrize("build", [tiny_model, lora_model, checkpointed_model, qwen_model, eager_model])
def test_packed_verdicts_and_their_gradient_equal_the_plain_ones(build: Callable[[], torch.nn.Module]) -> None:
    """Against one forward of each prompt with each ID; 1e-4."""
    model, trie, prompts = build(), device_trie(), rows(2, 7, 5)
    leaves = torch.tensor([[0, 6, 3, 1], [2, 4, 5, 0], [6, 5, -1, -1]])
    ids = Trie.build(SEMANTIC_IDS, CODES).semantic_ids
    expected = torch.zeros(leaves.shape)
    for row, at in (leaves >= 0).nonzero().tolist():
        expected[row, at] = plain_verdict(model, prompts[row], ids[leaves[row, at]])
    found = verdicts(model, prompts, leaves, trie)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found[leaves < 0] == 0).all()
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # What no verdict depends on has no gradient in either.
    gradients = torch.autograd.grad((found * weights).sum(), trained, allow_unused=True)
    plain = torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True)
    for one, other in zip(gradients, plain, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(verdicts(model, prompts, leaves, trie), found.detach(), atol=1e-5, rtol=1e-5)
    # One pass for both says the same as one for each.
    log_probs, again = judged_log_probs(model, prompts, leaves, trie)
    torch.testing.assert_close(again, found, atol=1e-5, rtol=1e-5)
    alone = completion_log_probs(model, prompts, leaves, trie)[0].sum(-1)
    torch.testing.assert_close(log_probs, alone, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(catalogues, lengths, st.integers(1, 30), st.integers(0, 9), st.sampled_from([40, 10_000]))
def test_judged_beams_are_the_beams_with_the_verdicts_of_each(
    semantic_ids: np.ndarray, lengths: list[int], width: int, seed: int, batch_tokens: int
) -> None:
    trie, prompts = device_trie(semantic_ids), rows(*lengths, seed=seed)
    leaves, log_probs, judged = judged_beam_search(MODEL, prompts, trie, width, batch_tokens)
    plain, scores = beam_search(MODEL, prompts, trie, width)
    # Equal beams may change places between batches of other sizes.
    torch.testing.assert_close(log_probs, scores, atol=1e-4, rtol=1e-4)
    ids = Trie.build(semantic_ids, CODES).semantic_ids
    with torch.no_grad():
        torch.testing.assert_close(judged, verdicts(MODEL, prompts, leaves, trie), atol=1e-4, rtol=1e-4)
        first = plain_verdict(MODEL, prompts[0], ids[leaves[0, 0]])
    torch.testing.assert_close(judged[0, 0], first, atol=1e-4, rtol=1e-4)
    assert (judged[leaves < 0] == 0).all() and ((leaves < 0) == (plain < 0)).all()


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_verdicts_of_any_number_of_pairs_are_the_plain_ones_in_their_places(batch_tokens: int) -> None:
    """1e-4; a prompt without pairs, and rows of any length in any order of batches."""
    prompts, ids = rows(3, 9, 1, 6), Trie.build(SEMANTIC_IDS, CODES).semantic_ids
    pairs = Ragged.from_lengths(np.array([4, 0, 0, 6, 5, 4, 3, 2], np.int64), np.array([1, 0, 5, 2]))
    found = pair_verdicts(MODEL, prompts, pairs, device_trie(), batch_tokens)
    with torch.no_grad():
        expected = [
            plain_verdict(MODEL, prompts[row], ids[leaf]).item()
            for row, leaf in zip(pairs.rows, pairs.values, strict=True)
        ]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)
    nothing = Ragged.from_lengths(np.zeros(0, np.int64), np.zeros(4, np.int64))
    assert pair_verdicts(MODEL, prompts, nothing, device_trie()).shape == (0,)


def test_search_leaves_the_training_mode_as_it_was() -> None:
    model = checkpointed_model()
    beam_search(model, rows(3), device_trie(), 2)
    assert model.training and not model.lm_head.weight.grad
