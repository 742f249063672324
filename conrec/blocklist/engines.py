"""Two engines that find each user's most probable semantic IDs and judge them: the same answers in torch and in vLLM.

`TorchEngine` is the decoding that training and evaluation use. `VllmEngine` runs the same level-synchronous beams as
requests of one token each: allowed are the children of the beam's node, returned are their log-probabilities
renormalised over the allowed ones. A prompt is computed once by vLLM's prefix cache, as far as it fills cache blocks.
vLLM is touched nowhere else, and imported only when the engine starts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.errors import ArtefactError, ConfigError, MissingDependencyError
from conrec.policy.decoding import (
    DeviceTrie,
    beam_search,
    check_trie,
    completion_log_probs,
    judged_beam_search,
    judged_log_probs,
    length_batches,
)
from conrec.policy.prompts import CACHE_BLOCK
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged, pairs

LONGEST_PROMPT = 4096
CONCURRENT_REQUESTS = 256
"""vLLM requests in flight; each holds a cache block of its own beside the prompt's."""


class EngineGoneError(Exception):
    """The engine answers nothing any more: its process or its device is gone. No mistake that a person can mend."""


class Engine(Protocol):
    """What generation needs of a model. Arrays are numpy.

    Leaves of -1 are padding: they have probability zero, and the verdict on them is 0.
    """

    vocabulary: Vocabulary
    longest_prompt: int

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        """The most probable leaves by beam search, best first: leaves (B, width) int64, log-probabilities float32."""

    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        """Log-probability of given leaves. Shape: (B, W) -> (B, W) float32."""

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `generate` returns, and the verdict on each, for little more than it costs. Shape: (B, width) each.

        The verdict is log P(rejected | ID, prompt) - log P(liked | ID, prompt).
        """

    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `score` returns, and the verdict on each, for little more than it costs. Shape: (B, W) each."""


def open_engine(checkpoint: Path, trie: Trie, settings: GenerateSettings) -> Engine:
    """The engine that the settings name, with a merged checkpoint and its tokenizer; raises as `require_safe`."""
    require_safe(checkpoint)
    threads = max(settings.cpus_per_engine, (os.cpu_count() or 1) // settings.engines)
    if settings.engine == "vllm":
        return VllmEngine(checkpoint, trie, settings, threads)
    torch.set_num_threads(threads)
    return TorchEngine.load(checkpoint, trie)


def require_safe(checkpoint: Path) -> None:
    """Raises `ArtefactError` for a checkpoint that brings code, or weights in another form than safetensors.

    Neither engine would run such code; but transformers asks at the terminal, and loads a known architecture in place
    of the one that the checkpoint means.
    """
    if not any(checkpoint.glob("*.safetensors")):
        raise ArtefactError(f"{checkpoint}: no *.safetensors; weights in another form may hold code: convert them")
    for name in ("config.json", "tokenizer_config.json"):
        try:
            document = json.loads((checkpoint / name).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{checkpoint / name}: not readable ({error}); run the train stage again") from None
        if not isinstance(document, dict) or "auto_map" in document:
            raise ArtefactError(
                f"{checkpoint / name}: auto_map asks to run code that the checkpoint brings, which is never run; "
                "name a model whose architecture transformers has"
            )


def require_cache(model: dict[str, Any], settings: GenerateSettings) -> None:
    """Raises `ConfigError` where vLLM on CPU could not start, since the longest prompt of a model of this config.json
    does not fit in `generate.kv_cache_gib`.

    Models whose attention does not see the whole prompt need less; what they need is left to vLLM.
    """
    whole = set(model.get("layer_types") or ()) <= {"full_attention"} and not model.get("sliding_window")
    whole = whole and "kv_lora_rank" not in model
    if settings.engine != "vllm" or settings.use_gpu or not whole:
        return
    head_size = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    tokens = -(-min(model["max_position_embeddings"], LONGEST_PROMPT) // CACHE_BLOCK) * CACHE_BLOCK
    # Keys and values, four bytes each.
    gib = 2 * 4 * model["num_hidden_layers"] * heads * head_size * tokens / 2**30
    if gib > settings.kv_cache_gib:
        raise ConfigError(
            f"generate.kv_cache_gib = {settings.kv_cache_gib:g} holds no prompt of {tokens} tokens, which takes "
            f"{gib:.4g} GiB with this model; write generate.kv_cache_gib = {math.ceil(gib * 100) / 100:g} or more"
        )


class TorchEngine:
    """`conrec.policy.decoding` on whatever device the model is."""

    def __init__(self, model: Any, trie: Trie, vocabulary: Vocabulary) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.trie = DeviceTrie(trie, vocabulary, model.device)
        self.longest_prompt = min(LONGEST_PROMPT, model.config.max_position_embeddings) - trie.levels - 1

    @classmethod
    def load(cls, checkpoint: Path, trie: Trie) -> TorchEngine:
        """From a checkpoint folder; on the GPU where there is one. Raises as `require_safe`."""
        require_safe(checkpoint)
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True).to(device)
        return cls(model.eval(), trie, _vocabulary(checkpoint, trie))

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        leaves, log_probs = beam_search(self.model, prompts, self.trie, width)
        return leaves.cpu().numpy(), log_probs.cpu().numpy()

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        leaves, log_probs, verdict = judged_beam_search(self.model, prompts, self.trie, width)
        return leaves.cpu().numpy(), log_probs.cpu().numpy(), verdict.cpu().numpy()

    @torch.no_grad()
    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        scores = np.full(leaves.shape, -np.inf, np.float32)
        for rows, batch, given in self._batches(prompts, leaves, self.trie.levels - 1):
            steps, _ = completion_log_probs(self.model, batch, given, self.trie)
            scores[rows] = steps.sum(-1).cpu().numpy()
        return np.where(leaves >= 0, scores, -np.inf)

    @torch.no_grad()
    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, judged = np.zeros(leaves.shape, np.float32), np.zeros(leaves.shape, np.float32)
        for rows, batch, given in self._batches(prompts, leaves, self.trie.levels):
            log_probs, verdict = judged_log_probs(self.model, batch, given, self.trie)
            scores[rows], judged[rows] = log_probs.cpu().numpy(), verdict.cpu().numpy()
        return np.where(leaves >= 0, scores, -np.inf), judged

    def _batches(
        self, prompts: Ragged, leaves: np.ndarray, depth: int
    ) -> Iterator[tuple[np.ndarray, Ragged, torch.Tensor]]:
        """Rows, their prompts and their leaves, few enough to be computed at once with `depth` positions a leaf."""
        for rows in length_batches(prompts.lengths, leaves.shape[1] * depth, self.trie.batch_tokens):
            yield rows, prompts.take(rows), torch.as_tensor(leaves[rows], device=self.trie.device)


class VllmEngine:
    """vLLM in this process, on CPU or GPU."""

    def __init__(self, checkpoint: Path, trie: Trie, settings: GenerateSettings, threads: int) -> None:
        """Starts the engine: seconds. Raises `MissingDependencyError` without vLLM."""
        self.vocabulary = _vocabulary(checkpoint, trie)
        check_trie(trie, self.vocabulary)
        self.trie = trie
        self._edge_keys = [
            pairs(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), codes, trie.codes)
            for offsets, codes in zip(trie.child_offsets, trie.child_codes, strict=True)
        ]
        self._llm = _start_vllm(checkpoint, max(trie.widest), settings, threads)
        config = self._llm.llm_engine.vllm_config
        # After the prompt come an ID and the kind that is asked for.
        self.longest_prompt = config.model_config.max_model_len - trie.levels - 1
        # Half of the cache for prompts: what is evicted before the next level would be computed again.
        self._prompt_tokens = config.cache_config.num_gpu_blocks * config.cache_config.block_size // 2
        self._request = lru_cache(maxsize=1 << 16)(self._build_request)

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        leaves = np.full((len(prompts), width), -1)
        log_probs = np.full((len(prompts), width), -np.inf, np.float32)
        for rows in self._passes(prompts):
            beams, scores = self._beams(prompts.take(rows), width)
            leaves[rows, : beams.shape[1]] = beams
            log_probs[rows, : beams.shape[1]] = scores
        return leaves, log_probs

    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        scores = np.full(leaves.shape, -np.inf, np.float32)
        for rows in self._passes(prompts):
            scores[rows] = self._score(prompts.take(rows), leaves[rows])
        return scores

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        leaves = np.full((len(prompts), width), -1)
        log_probs = np.full((len(prompts), width), -np.inf, np.float32)
        judged = np.zeros((len(prompts), width), np.float32)
        # Judged in the pass that found them, while the cache still holds their prompts.
        for rows in self._passes(prompts):
            batch = prompts.take(rows)
            beams, scores = self._beams(batch, width)
            leaves[rows, : beams.shape[1]] = beams
            log_probs[rows, : beams.shape[1]] = scores
            judged[rows, : beams.shape[1]] = self._judge(batch, beams)
        return leaves, log_probs, judged

    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.full(leaves.shape, -np.inf, np.float32)
        judged = np.zeros(leaves.shape, np.float32)
        for rows in self._passes(prompts):
            batch = prompts.take(rows)
            scores[rows], judged[rows] = self._score(batch, leaves[rows]), self._judge(batch, leaves[rows])
        return scores, judged

    def _passes(self, prompts: Ragged) -> Iterator[np.ndarray]:
        return length_batches(prompts.lengths, 0, self._prompt_tokens)

    def _beams(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        trie = self.trie
        nodes = np.zeros((len(prompts), 1), np.int64)
        codes = np.zeros((len(prompts), 1, 0), np.int64)
        log_probs = np.zeros((len(prompts), 1), np.float32)
        for level in range(trie.levels):
            rows = np.repeat(np.arange(len(prompts)), nodes.shape[1])
            # Of one node's children no more than `width` can survive.
            step = self._step(prompts, rows, nodes.ravel(), codes.reshape(len(rows), level), level, width)
            totals = (log_probs[..., None] + step.reshape(*nodes.shape, -1)).reshape(len(prompts), -1)
            best = np.argsort(-totals, axis=1, kind="stable")[:, : min(width, len(trie.child_codes[level]))]
            log_probs = np.take_along_axis(totals, best, 1)
            parents, position = np.divmod(best, step.shape[1])
            nodes = trie.child_offsets[level][np.take_along_axis(nodes, parents, 1)] + position
            codes = np.take_along_axis(codes, parents[..., None], 1)
            codes = np.concatenate([codes, trie.child_codes[level][nodes][..., None]], 2)
        return nodes, log_probs

    def _score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        trie = self.trie
        rows, columns = np.nonzero(leaves >= 0)
        leaf = leaves[rows, columns]
        total = np.zeros(len(leaf), np.float32)
        nodes = np.zeros(len(leaf), np.int64)
        for level in range(trie.levels):
            # Leaves of a prompt that share a prefix share the request.
            node_count = len(trie.child_offsets[level]) - 1
            _, first, request = np.unique(pairs(rows, nodes, node_count), return_index=True, return_inverse=True)
            codes = trie.semantic_ids[leaf[first], :level]
            step = self._step(prompts, rows[first], nodes[first], codes, level, max(trie.widest))
            edges = np.searchsorted(self._edge_keys[level], pairs(nodes, trie.semantic_ids[leaf, level], trie.codes))
            total += step[request, edges - trie.child_offsets[level][nodes]]
            nodes = edges
        scores = np.full(leaves.shape, -np.inf, np.float32)
        scores[rows, columns] = total
        return scores

    def _judge(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(leaves >= 0)
        tokens = self.vocabulary.code_tokens(self.trie.semantic_ids[leaves[rows, columns]])
        kinds = _one_token([self.vocabulary.rejected, self.vocabulary.liked], 2)
        token, log_prob, request = self._next(prompts, rows, tokens, [kinds] * len(rows))
        by_kind = np.zeros((len(rows), 2), np.float32)
        by_kind[request, (token == self.vocabulary.liked).astype(np.int64)] = log_prob
        judged = np.zeros(leaves.shape, np.float32)
        judged[rows, columns] = by_kind[:, 0] - by_kind[:, 1]
        return judged

    def _step(
        self, prompts: Ragged, rows: np.ndarray, nodes: np.ndarray, codes: np.ndarray, level: int, most: int
    ) -> np.ndarray:
        """One token after each prefix: log-probabilities of the (at most `most` best) children of its node.

        Shape: rows (R,) of the prompts, nodes (R,), codes (R, level) on the way to them -> (R, widest[level]), -inf
        elsewhere.
        """
        first, starts = self.vocabulary.first_code_token, self.trie.child_offsets[level]
        step = np.full((len(rows), self.trie.widest[level]), -np.inf, np.float32)
        branches = np.diff(starts)[nodes] > 1
        step[~branches, 0] = 0  # an only child is certain
        asked = np.flatnonzero(branches)
        if not len(asked):
            return step
        tokens = first + np.arange(level) * self.trie.codes + codes[asked]
        parameters = [self._request(level, node, most) for node in nodes[asked].tolist()]
        token, log_prob, request = self._next(prompts, rows[asked], tokens, parameters)
        parents = nodes[asked[request]]
        code = token - first - level * self.trie.codes
        edges = np.searchsorted(self._edge_keys[level], pairs(parents, code, self.trie.codes))
        step[asked[request], edges - starts[parents]] = log_prob
        return step

    def _next(
        self, prompts: Ragged, rows: np.ndarray, tokens: np.ndarray, parameters: list[Any]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What may come after each text, a prompt and then tokens: allowed tokens, log-probabilities, of which text.

        Shape: rows (R,) of the prompts, tokens (R, depth), R parameters -> (N,) each; a token may come twice in a text.
        """
        texts = [prompts[row].tolist() for row in range(len(prompts))]
        requests = [
            {"prompt_token_ids": texts[row] + path} for row, path in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        try:
            answers = self._llm.generate(requests, parameters, use_tqdm=False)
        except Exception as error:
            self._forget_unfinished(error)
            raise
        outputs = [answer.outputs[0].logprobs for answer in answers]
        counts = np.array([len(output.token_ids) for output in outputs])
        token = np.fromiter(chain.from_iterable(output.token_ids for output in outputs), np.int64, counts.sum())
        log_prob = np.fromiter(chain.from_iterable(output.logprobs for output in outputs), np.float32, counts.sum())
        request = np.repeat(np.arange(len(rows)), counts)
        # Where a node has fewer children than asked for, vLLM fills up with tokens that are not allowed.
        real = np.isfinite(log_prob)
        return token[real], log_prob[real], request[real]

    def _forget_unfinished(self, error: Exception) -> None:
        """Makes the engine what it was before a call that failed. Raises `EngineGoneError` where it cannot."""
        # Left in the engine, requests would be answered among the next ones, which would be taken for them.
        left = list(self._llm.llm_engine.output_processor.request_states)
        self._llm.llm_engine.abort_request(left, internal=True)
        # Blocks of prompts are in the cache as soon as they are scheduled, though nobody may have computed them.
        if not self._llm.reset_prefix_cache():
            raise EngineGoneError(f"its cache cannot be emptied after {type(error).__name__}: {error}") from error

    def _build_request(self, level: int, node: int, most: int) -> Any:
        start, end = self.trie.child_offsets[level][node : node + 2]
        first = self.vocabulary.first_code_token + level * self.trie.codes
        return _one_token((first + self.trie.child_codes[level][start:end]).tolist(), int(min(most, end - start)))


def _one_token(allowed: list[int], most: int) -> Any:
    """Parameters of a request for the log-probabilities of the (at most `most` best) allowed next tokens."""
    from vllm import SamplingParams

    # Neither detokenized nor cloned, log-probabilities as flat lists: what a request costs decides the speed.
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        allowed_token_ids=allowed,
        logprobs=most,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
    )


def _vocabulary(checkpoint: Path, trie: Trie) -> Vocabulary:
    from transformers import AutoTokenizer

    return Vocabulary.of(AutoTokenizer.from_pretrained(checkpoint), trie.levels, trie.codes)


def _start_vllm(checkpoint: Path, widest: int, settings: GenerateSettings, threads: int) -> Any:
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
    if widest > 1024:
        # The second model runner refuses more allowed tokens than this.
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "0"
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
        {"gpu_memory_utilization": settings.gpu_memory_share}
        if settings.use_gpu
        else {
            "dtype": "float32",
            "enforce_eager": True,
            # The smallest that its CPU attention takes, where the default is 128: what a prompt has beyond its last
            # full block is computed again by every beam.
            "block_size": CACHE_BLOCK,
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * 2**30),
        }
    )
    try:
        return LLM(
            model=str(checkpoint),
            # A checkpoint's own top_k or top_p would silently prune the beams.
            generation_config="vllm",
            # Raw log-probabilities, the default, are not renormalised over the allowed tokens.
            logprobs_mode="processed_logprobs",
            # Children of a node, or the two kinds of a verdict.
            max_logprobs=max(widest, 2),
            enable_prefix_caching=True,
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
