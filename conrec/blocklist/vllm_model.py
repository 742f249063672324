"""vLLM as the reader of prompts: it computes them packed, and hands out what its layers attend to.

    read = VllmPrompts(checkpoint, settings, threads)
    leaves, log_probs, verdicts = judged_beam_search(model, prompts, trie, width, read=read)

A beam is a token or two beyond a prompt: as a request of its own it would cost vLLM as much Python as a prompt, and its
share of the prompt's last cache block again. So vLLM gets one request a user; the keys and values that its attention
layers are called with, and what the last layer gives, are kept while it runs, and the beams continue from them.

Invariant: what is handed out belongs to the prompts that were asked for, since the tokens that vLLM computed are
compared with them one by one. vLLM is touched nowhere else, and imported only when the engine starts.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conrec.config import GenerateSettings
from conrec.errors import ConfigError, MissingDependencyError
from conrec.policy.decoding import BATCH_TOKENS, DEVICE_BATCH_TOKENS
from conrec.policy.prefill import Read, from_packed, read_prompts
from conrec.policy.prompts import CACHE_BLOCK
from conrec.ragged import Ragged

LONGEST_PROMPT = 4096
CONCURRENT_REQUESTS = 256
"""vLLM requests in flight."""
SAME = 0.02
"""Largest difference between what vLLM and transformers compute of a prompt, of its largest number: bfloat16's own
errors stay below it."""


class EngineGoneError(Exception):
    """The engine answers nothing any more: its process or its device is gone. No mistake that a person can mend."""


class VllmPrompts:
    """vLLM in this process, on CPU or GPU, in place of `conrec.policy.prefill.read_prompts`."""

    def __init__(self, checkpoint: Path, settings: GenerateSettings, threads: int) -> None:
        """Starts the engine: seconds. Raises `MissingDependencyError` without vLLM."""
        self.llm = _start(checkpoint, settings, threads)
        self.longest = int(self.llm.llm_engine.vllm_config.model_config.max_model_len)
        self._tokens: list[Tensor] = []
        self._states: list[Tensor] = []
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        self.llm.apply_model(self._listen)

    def __call__(self, model: Any, prompts: Ragged, device: torch.device, room: int) -> Read:
        """The prompts, at least one and none of them empty, computed by vLLM for `model` of transformers to continue.

        Raises `EngineGoneError` where vLLM computed anything else than these prompts.
        """
        self._forget()
        try:
            self._compute(prompts)
            if not np.array_equal(torch.cat(self._tokens).cpu().numpy(), prompts.values):
                # Requests are computed in the order in which they come, as long as no step cuts one.
                raise EngineGoneError("vLLM computed other tokens than those of the prompts, or in another order")
            last = torch.cat(self._states)[torch.as_tensor(prompts.offsets[1:] - 1, device=self._states[0].device)]
            layers = [tuple(torch.cat(part).to(device) for part in zip(*one, strict=True)) for one in self._layers]
            return from_packed(last.to(device), layers, prompts, model, room)
        finally:
            self._forget()

    @torch.no_grad()
    def require_same(self, model: Any, prompt: np.ndarray) -> None:
        """Raises `ConfigError` unless vLLM computes of a prompt what transformers computes with this model."""
        one = Ragged.from_lengths(prompt, np.array([len(prompt)]))
        ours = read_prompts(model, one, model.device, 0)
        if len(self._layers) != len(ours.cache.layers):
            raise ConfigError(
                f"generate.engine = 'vllm': vLLM's {type(model).__name__} tells what {len(self._layers)} of its "
                f"{len(ours.cache.layers)} layers attend to; write generate.engine = 'torch'"
            )
        theirs = self(model, one, model.device, 0)
        pairs = [(ours.last, theirs.last)]
        for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            pairs += [(mine.keys, other.keys), (mine.values, other.values)]
        if not all(_same(mine, other) for mine, other in pairs):
            raise ConfigError(
                f"generate.engine = 'vllm': vLLM's {type(model).__name__} computes something else of a prompt than "
                "that of transformers; write generate.engine = 'torch'"
            )

    def _compute(self, prompts: Ragged) -> None:
        from vllm import SamplingParams

        # One token is the fewest that vLLM generates; nobody reads it.
        one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_clone=True)
        requests = [{"prompt_token_ids": prompts[row].tolist()} for row in range(len(prompts))]
        try:
            self.llm.generate(requests, one, use_tqdm=False)
        except Exception:
            # Left in the engine, requests would be answered among the next ones, which would be taken for them.
            left = list(self.llm.llm_engine.output_processor.request_states)
            self.llm.llm_engine.abort_request(left, internal=True)
            raise

    def _forget(self) -> None:
        self._tokens.clear()
        self._states.clear()
        for layer in self._layers:
            layer.clear()

    def _listen(self, model: torch.nn.Module) -> None:
        """Has the model and its attention layers tell what they compute."""
        from vllm.model_executor.layers.attention import Attention

        def told(_: Any, given: tuple[Any, ...], named: dict[str, Any], states: Tensor) -> None:
            tokens = named["input_ids"] if "input_ids" in named else given[0]
            self._tokens.append(tokens.clone())  # a buffer that the next step writes
            self._states.append(states)

        for layer in model.modules():
            if isinstance(layer, Attention):
                self._layers.append([])
                layer.register_forward_hook(_keeping(self._layers[-1], layer.num_kv_heads))
        model.register_forward_hook(told, with_kwargs=True)


def _same(mine: Tensor, other: Tensor) -> bool:
    if mine.shape != other.shape:
        return False
    return not (mine - other).abs().amax() > SAME * mine.abs().amax()  # never of numbers that are none


def _keeping(kept: list[tuple[Tensor, Tensor]], heads: int) -> Any:
    def attended(_: Any, given: tuple[Tensor, ...], __: Tensor) -> None:
        keys, values = (one.unflatten(-1, (heads, -1)) if one.ndim == 2 else one for one in given[1:3])
        kept.append((keys, values))

    return attended


def _start(checkpoint: Path, settings: GenerateSettings, threads: int) -> Any:
    # All of these are read when vLLM is imported or its engine starts.
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if settings.engines > 1:
        # Bound by itself, every engine would take the same cores.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.update(environment)
    try:
        from vllm import LLM
    except ImportError as error:
        raise MissingDependencyError(
            f"generate.engine = 'vllm': {error}; install the cpu or gpu extra, or set generate.engine = 'torch'"
        ) from error
    from transformers import AutoConfig

    torch.set_num_threads(threads)
    positions = AutoConfig.from_pretrained(checkpoint).max_position_embeddings
    on_device: dict[str, Any] = (
        {"gpu_memory_utilization": settings.gpu_memory_share, "max_num_batched_tokens": DEVICE_BATCH_TOKENS}
        if settings.use_gpu
        else {
            "dtype": "float32",
            # A batch of the search in one step: after one that cuts a prompt, vLLM's order is another.
            # The smallest that its CPU attention takes, where the default is 128.
            "block_size": CACHE_BLOCK,
            "max_num_batched_tokens": BATCH_TOKENS,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        }
    )
    try:
        return LLM(
            model=str(checkpoint),
            # A compiled model would not tell what its layers compute.
            enforce_eager=True,
            # What is in its cache already is not computed, and so not handed out.
            enable_prefix_caching=False,
            generation_config="vllm",
            skip_tokenizer_init=True,
            max_model_len=min(positions, LONGEST_PROMPT),
            max_num_seqs=CONCURRENT_REQUESTS,
            disable_log_stats=True,
            **on_device,
        )
    except ValueError as error:
        if "KV cache" not in str(error) and "cache blocks" not in str(error):
            raise
        setting = "gpu_memory_share" if settings.use_gpu else "kv_cache_gib"
        raise ConfigError(
            f"generate.{setting} = {getattr(settings, setting):g} leaves vLLM too little memory for the cache of one "
            f"prompt: {error}; raise it"
        ) from error
