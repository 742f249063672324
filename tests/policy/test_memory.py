"""What a position takes is asked of the model; held to what is kept of many, and to a figure of a GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_policy import CODES, LEVELS, TRIE
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from conrec.errors import ConfigError
from conrec.policy import memory
from conrec.policy.decoding import DeviceTrie, completion_log_probs, traced_samples
from conrec.policy.model import recompute_layers
from conrec.policy.vocabulary import Vocabulary
from conrec.policy.workers import out_of_memory
from conrec.ragged import Ragged

SMALL = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
)
# The sizes of Qwen3-0.6B, with two of its 28 layers.
QWEN = Qwen3Config(
    vocab_size=50,
    hidden_size=1024,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
)


GROUPED = Qwen3Config(
    vocab_size=50,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=192,
)
PROMPT, GROUP = 96, 6


def kept_by(run: Callable[[], Any], model: Any) -> int:
    """Bytes that autograd keeps of what runs, beside the model."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = run()
    sizes = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    assert made is not None
    return sum(size for place, size in sizes.items() if place not in own)


def passes(model: Any) -> dict[str, Callable[[int], Any]]:
    """What training keeps a graph of, for so many prompts: the supervised pass, a search, given completions."""
    trie = DeviceTrie(TRIE, Vocabulary(LEVELS, CODES, 10, *range(8)))
    group = torch.arange(GROUP)

    def prompts(count: int) -> Ragged:
        return Ragged.from_lengths(np.full(count * PROMPT, 3, np.int32), np.full(count, PROMPT))

    return {
        "plain": lambda count: model.get_decoder()(input_ids=torch.full((count, PROMPT), 3), use_cache=False),
        "search": lambda count: traced_samples(model, prompts(count), trie, GROUP, np.arange(count)),
        "given": lambda count: completion_log_probs(model, prompts(count), group.expand(count, -1), trie),
    }


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["llama", "qwen"])
def test_a_position_takes_what_training_keeps_of_it_and_at_most_twice_that(
    config: Any, dtype: torch.dtype, recompute: bool
) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    taken, layer = memory.learning_bytes(model, LEVELS, recompute), memory.kept_bytes(model) // config.num_hidden_layers
    if recompute:
        recompute_layers(model)
    kept = {}
    for name, run in passes(model).items():
        if recompute and name == "search":
            continue  # `Grpo` draws without a graph
        positions = PROMPT if name == "plain" else PROMPT + (LEVELS - 1) * GROUP
        kept[name] = (kept_by(lambda run=run: run(12), model) - kept_by(lambda run=run: run(4), model)) / (
            8 * positions
        )
    most = max(kept.values()) + (layer if recompute else 0)  # one layer at a time, computed again
    assert most <= taken <= 2 * most, kept


def test_a_position_of_qwen_keeps_what_an_h100_kept_of_it() -> None:
    """2.0 MB a token with all 28 layers were measured on the GPU; a step of GRPO may take more, not twice that."""
    model = AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16)
    assert 14 * memory.kept_bytes(model) == pytest.approx(2.0e6, rel=0.1)
    assert 2.0e6 <= 14 * memory.learning_bytes(model, 3, False) <= 2 * 2.0e6


def test_what_fits_is_neither_nothing_nor_more_than_helps() -> None:
    assert memory.fitting(80 * 10**9, 2 * 10**6) == 32_000
    assert memory.fitting(80 * 10**9, 1) == memory.DEVICE_BATCH_TOKENS
    assert memory.fitting(-5, 100) == 1


def test_a_position_without_a_gradient_takes_its_keys_and_values_and_a_layer() -> None:
    """Of Qwen3's 8 billion: 36 layers, keys and values of 8 heads of 128 in bfloat16, three times; one layer."""
    large = Qwen3Config(
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
    )
    assert memory.running_bytes(large, 2) == 3 * 36 * 2 * 8 * 128 * 2 + 2 * (8 * 4096 + 4 * 12288)
    # Whatever a configuration calls its sizes.
    other = GPT2Config(n_embd=64, n_layer=3, n_head=4)
    assert memory.running_bytes(other, 4) == 3 * 3 * 2 * 64 * 4 + 4 * (8 * 64 + 4 * 4 * 64)


def test_a_cpu_takes_what_was_measured_there() -> None:
    model = AutoModelForCausalLM.from_config(SMALL)
    assert (
        memory.decoding_positions(model)
        == memory.training_positions(model, 3, 10**6, 1, False, 500)
        == memory.BATCH_TOKENS
    )


def test_a_training_whose_longest_row_does_not_fit_says_what_lacks() -> None:
    """Of 2.3 billion parameters a GPU of 80 GB has 57 GB free; 43 come."""
    assert memory.room(57 * 10**9, 43 * 10**9, 6 * 10**6, 400) == memory.fitting(14 * 10**9, 6 * 10**6) > 400
    # What fits by a hair is tried.
    assert memory.room(57 * 10**9, 43 * 10**9, 6 * 10**6, 2_300) < 2_300
    for to_come, longest in ((56 * 10**9, 400), (60 * 10**9, 1)):
        with pytest.raises(ConfigError) as refused:
            memory.room(57 * 10**9, to_come, 6 * 10**6, longest)
        told = str(refused.value)
        assert f"has 57.0 GB free; optimiser, states and logits take {to_come / 1e9:.1f} GB" in told
        assert f"a row of {longest} tokens {longest * 6e-3:.1f} GB" in told and "more train.workers" in told


def test_a_gpu_that_is_too_small_says_what_to_write() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert "write train.tokens_at_once = 4096, or train.recompute_layers = true (CUDA out of memory" in str(
        out_of_memory(8192, 300, error)
    )
    # A row is not cut, and nothing is computed yet where the model alone does not fit.
    assert "write train.tokens_at_once = 300, or" in str(out_of_memory(400, 300, error))
    for tokens, told in ((300, "one row of 300 tokens beside the model: write train.rec"), (None, "write more train.")):
        message = str(out_of_memory(tokens, 300, error))
        assert told in message and "tokens_at_once" not in message and "[lora]" in message


def test_a_model_with_adapters_is_asked_as_well() -> None:
    plain = AutoModelForCausalLM.from_config(SMALL)
    kept = memory.kept_bytes(plain)
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    assert kept < memory.kept_bytes(adapted) < 2 * kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_gpu_takes_what_fits_it(recompute: bool) -> None:
    model = AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16).to("cuda")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 1_000 < memory.training_positions(model, 3, numbers, 1, recompute, 500) <= memory.DEVICE_BATCH_TOKENS
    assert 1_000 < memory.decoding_positions(model) <= memory.DEVICE_BATCH_TOKENS
