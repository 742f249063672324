"""How many positions a device computes at once: what is free there, over what one position of this model takes.

    training_positions(model, levels, trained, workers, recompute, longest)     # with a gradient
    decoding_positions(model)                                                   # without one

On a CPU they are constants that were measured to be fastest; on a GPU these are an upper bound, beyond which more
positions at once brought nothing, and memory decides below it. No figure of a result depends on them, but for the order
in which numbers are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from conrec.errors import ConfigError
from conrec.policy.head import decoder_and_head

BATCH_TOKENS = 8_192
"""Prompt and beam positions computed at a time on a CPU, padding included."""
DEVICE_BATCH_TOKENS = 65_536
"""The most on an accelerator, where what a batch costs to start is as much as some thousand positions."""
LOSS_POSITIONS = 1_024
"""Target positions whose logits over the whole vocabulary exist at once: enough for a full matrix product, .7 GiB of
float32 at 176 thousand tokens."""
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Of a model's configuration; of the last two a model may have none."""
FILLED = 0.8
"""Of what is free; the rest is for what an allocator cannot use, and for kernels' own."""

SMALLER_MODEL = (
    "write more train.workers, which share out masters, optimiser and states, train adapters with [lora], or take "
    "larger GPUs (docs/cluster.md says what a worker holds)"
)
SMALLER_ROW = f"write train.recompute_layers = true where it is false, or {SMALLER_MODEL.removeprefix('write ')}"
"""What to do where fewer positions at once are no help."""


def training_positions(model: Any, levels: int, trained: int, workers: int, recompute: bool, longest: int) -> int:
    """Positions whose gradient fits beside `trained` parameters of which `workers` share out what they keep.

    `longest`: positions of the longest row. Raises `ConfigError` where not even that one fits.
    """
    if model.device.type != "cuda":
        return BATCH_TOKENS
    # What comes with the first step and the first stage (docs/cluster.md), and logits with their gradient.
    to_come = (
        16 * trained // workers + trained * model.dtype.itemsize + 3 * 4 * LOSS_POSITIONS * model.config.vocab_size
    )
    return room(_free(model.device), to_come, learning_bytes(model, levels, recompute), longest)


def room(free: int, to_come: int, each: int, longest: int) -> int:
    """Positions of `each` bytes that fit what is free, less what is to come.

    Raises `ConfigError` where the longest row does not.
    """
    if free - to_come < longest * each:
        raise ConfigError(
            f"beside the model a worker's GPU has {free / 1e9:.1f} GB free; optimiser, states and logits take "
            f"{to_come / 1e9:.1f} GB and a row of {longest:,} tokens {longest * each / 1e9:.1f} GB: {SMALLER_ROW}. "
            "A number in train.tokens_at_once is tried all the same"
        )
    return fitting(free - to_come, each)


def decoding_positions(model: Any) -> int:
    """Positions of prompts and beams that fit, keys and values in a cache of their own."""
    if model.device.type != "cuda":
        return BATCH_TOKENS
    return fitting(_free(model.device), running_bytes(model.config, model.dtype.itemsize))


def fitting(free: int, each: int) -> int:
    """Positions of so many bytes each that fit what is free, at least one."""
    return max(1, min(DEVICE_BATCH_TOKENS, int(FILLED * free) // each))


def running_bytes(config: Any, each: int) -> int:
    """Bytes that a model of this configuration takes for one more position without a gradient, `each` a number."""
    # Keys and values as they are computed, joined, and padded in the cache; and what a layer holds while it runs.
    sizes = {name: getattr(config, name, None) for name in SIZES}
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 3 * cache_bytes(sizes, 1, each) + each * (8 * config.hidden_size + 4 * inner)


def learning_bytes(model: Any, levels: int, recompute: bool) -> int:
    """Bytes that a model takes for one more position of a training step, over semantic IDs of so many levels.

    Asked before its layers are told to be computed again.
    """
    config, each = model.config, model.dtype.itemsize
    running = running_bytes(config, each)
    if not recompute:
        # GRPO: what a search keeps, and beside it the policy that the stage began from, without a gradient.
        return kept_bytes(model, levels - 1) + running
    # A layer's input, and one layer whole with its gradient; a measurement's beams may take more.
    layers = config.num_hidden_layers
    return max(running, each * config.hidden_size * layers + 2 * kept_bytes(model) // layers)


def kept_bytes(model: Any, steps: int = 0) -> int:
    """Bytes that the layers of a model keep for the gradient of one more position: asked of the model itself.

    `steps`: of a search that go on from it, each of which keeps all keys and values before it anew.
    """
    short, long = 32, 96
    return -(-(_kept(model, long, steps) - _kept(model, short, steps)) // (long - short))


def _kept(model: Any, length: int, steps: int) -> int:
    from transformers import DynamicCache  # loaded with the model

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its memory would be another tensor's next
        return tensor

    decoder = decoder_and_head(model)[0]
    tokens = torch.zeros((1, length), dtype=torch.int64, device=model.device)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cache = DynamicCache(config=decoder.config)
        decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
        for end in range(length, length + steps):
            decoder(
                input_ids=tokens[:, :1],
                # With a mask, as beams have one, a head's keys and values are copied for each of its queries' heads.
                attention_mask=torch.zeros((1, 1, 1, end + 1), dtype=decoder.dtype, device=model.device),
                position_ids=torch.full((1, 1), end, device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
    return sum(sizes.values())


def cache_bytes(sizes: Mapping[str, Any], tokens: int, each: int) -> int:
    """Keys and values of so many tokens, `each` bytes a number, in a model of these `SIZES` of which every layer sees
    the whole prompt."""
    size = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    heads = sizes.get("num_key_value_heads") or sizes["num_attention_heads"]
    return int(2 * sizes["num_hidden_layers"] * heads * size * tokens * each)


def _free(device: torch.device) -> int:
    # What torch holds and does not use is free as well.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
