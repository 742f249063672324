"""vLLM as the model that a search asks: prompts as requests, and beams through the same layers and weights.

    model = VllmModel(checkpoint, settings, threads)
    model.take(plain, prompt)                  # its head, and the proof that both compute the same
    leaves, log_probs, verdicts = judged_beam_search(model, prompts, trie, width, read=model.read)

A beam is a token or two beyond a prompt: as a request of its own it would cost vLLM as much Python as a prompt, and its
share of the prompt's last cache block again. So vLLM gets one request a user, and the keys and values that its
attention layers are called with are kept while it runs. Beams go through vLLM's layers as well, called without its
scheduler; only the attention is not vLLM's, whose paged cache knows no beams: it is torch's, over what was kept.

Invariant: what is kept belongs to the prompts that were asked for, since the tokens that vLLM computed are compared
with them one by one. vLLM is touched nowhere else, and imported only when the engine starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from conrec.config import GenerateSettings
from conrec.errors import ConfigError, MissingDependencyError
from conrec.policy import memory
from conrec.policy.decoding import additive
from conrec.policy.memory import BATCH_TOKENS, DEVICE_BATCH_TOKENS
from conrec.policy.prefill import Read, from_packed, read_prompts
from conrec.policy.prompts import CACHE_BLOCK
from conrec.ragged import Ragged

LONGEST_PROMPT = 4096
CONCURRENT_REQUESTS = 256
"""vLLM requests in flight."""
CUT = {"distributed_executor_backend": "external_launcher", "seed": 0}
"""Every process computes its part of the layers in itself, as `conrec.blocklist.cut_engine` started it."""
SAME = 0.02
"""Largest difference between what vLLM and transformers compute of a prompt, of its largest number: bfloat16's own
errors stay below it."""


class EngineGoneError(Exception):
    """The engine answers nothing any more: its process or its device is gone. No mistake that a person can mend."""


class _Beams(NamedTuple):
    """What attention asks of beams. Shape: visible (B, 1, W, T) to add to scores, for T positions in the cache."""

    shape: torch.Size
    visible: Tensor
    cache: Any


class VllmModel:
    """vLLM in this process, on CPU or GPU, with what `conrec.policy.decoding` asks of a model of transformers."""

    training = False

    def __init__(self, checkpoint: Path, settings: GenerateSettings, threads: int) -> None:
        """Starts the engine: seconds. Raises `MissingDependencyError` without vLLM."""
        from transformers import AutoConfig

        self.llm = _start(checkpoint, settings, threads)
        served = self.llm.llm_engine.vllm_config.model_config
        self.longest = int(served.max_model_len)
        self.dtype = served.dtype
        self.config = AutoConfig.from_pretrained(checkpoint, attn_implementation="sdpa")
        self.head: torch.nn.Module | None = None
        self._tokens: list[Tensor] = []
        self._states: list[Tensor] = []
        self._layers: list[list[tuple[Tensor, Tensor]]] = []
        self._beams: _Beams | None = None
        self.llm.apply_model(self._listen)

    def get_decoder(self) -> VllmModel:
        """The layers, which are called as those of transformers are."""
        return self

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """The head, of transformers."""
        return self.head

    def eval(self) -> VllmModel:
        """Nothing to do: it is never trained."""
        return self

    def train(self, _: bool) -> VllmModel:
        """As `eval`; the search asks for the mode that it found."""
        return self

    def read(self, _: Any, prompts: Ragged, device: torch.device, room: int) -> Read:
        """The prompts, at least one and none of them empty, computed by vLLM: a `conrec.policy.prefill.ReadPrompts`.

        Raises `EngineGoneError` where vLLM computed anything else than these prompts.
        """
        self._forget()
        try:
            self._compute(prompts)
            if not np.array_equal(torch.cat(self._tokens).cpu().numpy(), prompts.values):
                # Requests are computed in the order in which they come, as long as no step cuts one.
                raise EngineGoneError("vLLM computed other tokens than those of the prompts, or in another order")
            last = torch.cat(self._states)[torch.as_tensor(prompts.offsets[1:] - 1, device=device)]
            layers = [tuple(torch.cat(part) for part in zip(*one, strict=True)) for one in self._layers]
            return from_packed(last, layers, prompts, self, room)
        finally:
            self._forget()

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, use_cache: bool
    ) -> Any:
        """What follows prompts that were read, through all layers; `last_hidden_state` is what comes out.

        Shape: tokens and positions (B, W), mask (B, 1, W, T) to add to scores -> (B, W, H).
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast

        assert use_cache
        self._beams = _Beams(input_ids.shape, attention_mask, past_key_values)
        try:
            # Its kernels read memory, not strides: one position of a row may stand for all of its beams.
            states = self.layers(input_ids.flatten().contiguous(), position_ids.flatten().contiguous())
        finally:
            self._beams = None
        return BaseModelOutputWithPast(last_hidden_state=states.unflatten(0, input_ids.shape))

    @torch.no_grad()
    def take(self, plain: Any, prompt: np.ndarray) -> None:
        """Takes the head of the same model of transformers, on the CPU.

        Raises `ConfigError` unless vLLM computes of a prompt, and of its last token once more behind it, what that
        model computes.
        """
        self.head = plain.get_output_embeddings().to(self.device)
        one = Ragged.from_lengths(prompt, np.array([len(prompt)]))
        ours = read_prompts(plain, one, plain.device, 1)
        if len(self._layers) != len(ours.cache.layers):
            raise ConfigError(
                f"generate.engine = 'vllm': vLLM's {type(plain).__name__} tells what {len(self._layers)} of its "
                f"{len(ours.cache.layers)} layers attend to; write generate.engine = 'torch'"
            )
        theirs = self.read(self, one, self.device, 1)
        pairs = [(ours.last, theirs.last)]
        for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
            pairs += [(self._part(mine.keys), other.keys), (self._part(mine.values), other.values)]
        if all(_same(mine, other) for mine, other in pairs):
            pairs = [(_one_more(plain.get_decoder(), ours, prompt), _one_more(self, theirs, prompt))]
        if not all(_same(mine, other) for mine, other in pairs):
            raise ConfigError(
                f"generate.engine = 'vllm': vLLM's {type(plain).__name__} computes something else of a prompt than "
                "that of transformers; write generate.engine = 'torch'"
            )

    def _part(self, heads: Tensor) -> Tensor:
        """The heads that this process holds of all. Shape: (B, heads, T, size)."""
        cut = self.llm.llm_engine.vllm_config.parallel_config
        if cut.tensor_parallel_size == 1:
            return heads
        rank, total = int(os.environ["RANK"]), heads.shape[1]
        first = rank * total // cut.tensor_parallel_size
        return heads[:, first : first + max(1, total // cut.tensor_parallel_size)]

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

    def _listen(self, layers: torch.nn.Module) -> None:
        """Has vLLM's model tell what it computes of prompts, and its attention layers attend for beams."""
        from vllm.model_executor.layers.attention import Attention

        self.layers = layers
        self.device = next(layers.parameters()).device

        def told(_: Any, given: tuple[Any, ...], named: dict[str, Any], states: Tensor) -> None:
            if self._beams is None:
                tokens = named["input_ids"] if "input_ids" in named else given[0]
                self._tokens.append(tokens.clone())  # a buffer that the next step writes
                self._states.append(states)

        for layer in layers.modules():
            if isinstance(layer, Attention):
                layer.forward = self._attention(layer, len(self._layers))
                self._layers.append([])
        layers.register_forward_hook(told, with_kwargs=True)

    def _attention(self, layer: Any, number: int) -> Callable[..., Tensor]:
        """Of one layer: vLLM's own for prompts, which is told of, and torch's for beams."""
        own = layer.forward

        def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
            keys, values = (one.reshape(len(one), layer.num_kv_heads, -1) for one in (key, value))
            if self._beams is None:
                self._layers[number].append((keys, values))
                return cast(Tensor, own(query, key, value, *rest, **named))
            shape, visible, cache = self._beams
            queries = query.reshape(len(query), layer.num_heads, -1)
            queries, keys, values = (one.unflatten(0, shape).transpose(1, 2) for one in (queries, keys, values))
            keys, values = cache.update(keys, values, number)
            grouped = layer.num_heads != layer.num_kv_heads
            attended = functional.scaled_dot_product_attention(
                queries, keys, values, visible, scale=layer.impl.scale, enable_gqa=grouped
            )
            return attended.transpose(1, 2).reshape(len(query), -1)

        return forward


def _one_more(decoder: Any, read: Read, prompt: np.ndarray) -> Tensor:
    """The state of a prompt's last token once more behind it. Shape: (1, 1, H)."""
    from conrec.policy.cache import aligned

    device = read.last.device
    seen = torch.ones(1, 1, len(prompt) + 1, dtype=torch.bool, device=device)
    return cast(
        Tensor,
        decoder(
            input_ids=torch.tensor([[int(prompt[-1])]], device=device),
            attention_mask=additive(aligned(seen), decoder),
            position_ids=torch.tensor([[len(prompt)]], device=device),
            past_key_values=read.cache,
            use_cache=True,
        ).last_hidden_state,
    )


def _same(mine: Tensor, other: Tensor) -> bool:
    if mine.shape != other.shape:
        return False
    difference = (mine.float() - other.to(mine.device).float()).abs().amax()
    return not difference > SAME * mine.abs().amax()  # never of numbers that are none


def cache_bytes(model: dict[str, Any], tokens: int) -> int | None:
    """Keys and values of prompts in float32, for a model of this config.json.

    None where it tells too little: models whose attention does not see the whole prompt need less, and others have
    other names for their sizes than Llama's, as GPT-2 has.
    """
    if not {"hidden_size", "num_attention_heads", "num_hidden_layers"} <= model.keys():
        return None
    whole = set(model.get("layer_types") or ()) <= {"full_attention"} and not model.get("sliding_window")
    if not whole or "kv_lora_rank" in model:
        return None
    return memory.cache_bytes(model, tokens, 4)


def _start(checkpoint: Path, settings: GenerateSettings, threads: int) -> Any:
    # All of these are read when vLLM is imported or its engine starts.
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    if settings.engines * settings.tensor_parallel > 1:
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
    config = AutoConfig.from_pretrained(checkpoint)
    positions = config.max_position_embeddings
    # A step's prompts, each in blocks of its own with one more for the token behind it: more would be written with
    # zeros, seconds a gigabyte, and never used.
    enough = cache_bytes(config.to_dict(), BATCH_TOKENS + 2 * CACHE_BLOCK * CONCURRENT_REQUESTS)
    on_device: dict[str, Any] = (
        {"gpu_memory_utilization": settings.gpu_memory_share, "max_num_batched_tokens": DEVICE_BATCH_TOKENS}
        if settings.use_gpu
        else {
            "dtype": "float32",
            # A batch of the search in one step: after one that cuts a prompt, vLLM's order is another.
            # The smallest that its CPU attention takes, where the default is 128.
            "block_size": CACHE_BLOCK,
            "max_num_batched_tokens": BATCH_TOKENS,
            "kv_cache_memory_bytes": min(int(settings.kv_cache_gib * 2**30), enough or sys.maxsize),
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
            **({} if settings.tensor_parallel == 1 else CUT),
            tensor_parallel_size=settings.tensor_parallel,
            **on_device,
        )
    except ValueError as error:
        if (told := told_of_start(str(error), settings)) is None:
            raise
        raise told from error


def told_of_start(why: str, settings: GenerateSettings) -> ConfigError | None:
    """What vLLM refuses to start for, as the setting that it lies at; None for what lies at none."""
    if "tensor parallel size" in why:  # which heads do not divide by
        return ConfigError(f"generate.tensor_parallel = {settings.tensor_parallel}: {why}")
    if "Free memory on device" in why:
        return ConfigError(
            f"generate.gpu_memory_share = {settings.gpu_memory_share:g} is more than is free of the GPU: {why}; end "
            "what else holds it, or lower the share"
        )
    if "KV cache" in why or "cache blocks" in why:
        setting = "gpu_memory_share" if settings.use_gpu else "kv_cache_gib"
        return ConfigError(
            f"generate.{setting} = {getattr(settings, setting):g} leaves vLLM too little memory for the cache of one "
            f"prompt: {why}; raise it"
        )
    return None
