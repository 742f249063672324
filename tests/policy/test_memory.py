"""What a position takes is asked of the model; held to what is kept of many, and to a figure of a GPU."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from conrec.policy import memory
from conrec.policy.workers import out_of_memory

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_keeps_what_many_keep(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(SMALL, dtype=dtype)
    kept = []
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_decoder()(input_ids=torch.zeros((4, 500), dtype=torch.int64), use_cache=False)
    assert memory.kept_bytes(model) == pytest.approx(sum(seen.values()) / 2000, rel=0.05)


def test_a_position_of_qwen_keeps_what_an_h100_kept_of_it() -> None:
    """2.0 MB a token with all 28 layers, which were measured on the GPU."""
    model = AutoModelForCausalLM.from_config(QWEN, dtype=torch.bfloat16)
    assert 14 * memory.kept_bytes(model) == pytest.approx(2.0e6, rel=0.1)


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
    assert memory.decoding_positions(model) == memory.training_positions(model, 10**6, 1, False) == memory.BATCH_TOKENS


def test_a_gpu_that_is_too_small_says_what_to_write() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert "write train.tokens_at_once = 4096, or train.recompute_layers = true (CUDA out of memory" in str(
        out_of_memory(8192, error)
    )


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
    assert 1_000 < memory.training_positions(model, numbers, 1, recompute) <= memory.DEVICE_BATCH_TOKENS
    assert 1_000 < memory.decoding_positions(model) <= memory.DEVICE_BATCH_TOKENS
