"""Two engines that find each user's most probable semantic IDs and judge them: the same answers in torch and in vLLM.

`TorchEngine` is the decoding that training and evaluation use. `VllmEngine` is the same with vLLM's model in place of
that of transformers (`conrec.blocklist.vllm_model`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from conrec.blocklist.vllm_model import LONGEST_PROMPT, VllmModel, cache_bytes
from conrec.catalogue.trie import Trie
from conrec.config import GenerateSettings
from conrec.errors import ArtefactError, ConfigError
from conrec.policy.decoding import (
    DeviceTrie,
    beam_search,
    check_trie,
    completion_log_probs,
    judged_beam_search,
    judged_log_probs,
    length_batches,
)
from conrec.policy.memory import decoding_positions
from conrec.policy.prefill import ReadPrompts, read_prompts
from conrec.policy.prompts import CACHE_BLOCK
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged


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


def open_engine(checkpoint: Path, trie: Trie, settings: GenerateSettings, most: int = sys.maxsize) -> Engine:
    """The engine that the settings name, with a merged checkpoint and its tokenizer; raises as `require_safe`.

    `most`: positions at once of one whose model is cut, which cannot halve a batch while it runs.
    """
    require_safe(checkpoint)
    processes = settings.engines * settings.tensor_parallel
    threads = max(settings.cpus_per_engine, (os.cpu_count() or 1) // processes)
    if settings.tensor_parallel > 1:
        from conrec.blocklist.cut_engine import CutEngine  # whose processes each open one of this file's

        return CutEngine(checkpoint, trie, settings, threads, most)
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

    A model whose needs its file does not tell is left to vLLM (`cache_bytes`).
    """
    if settings.engine != "vllm" or settings.use_gpu or "max_position_embeddings" not in model:
        return
    tokens = -(-min(model["max_position_embeddings"], LONGEST_PROMPT) // CACHE_BLOCK) * CACHE_BLOCK
    needed = cache_bytes(model, tokens)
    if needed is not None and needed > settings.kv_cache_gib * 2**30:
        gib = needed / 2**30
        raise ConfigError(
            f"generate.kv_cache_gib = {settings.kv_cache_gib:g} holds no prompt of {tokens} tokens, which takes "
            f"{gib:.4g} GiB with this model; write generate.kv_cache_gib = {math.ceil(gib * 100) / 100:g} or more"
        )


class TorchEngine:
    """`conrec.policy.decoding` on whatever device the model is; `read` computes the prompts."""

    def __init__(self, model: Any, trie: Trie, vocabulary: Vocabulary, read: ReadPrompts = read_prompts) -> None:
        self.model = model
        self.read = read
        self.vocabulary = vocabulary
        self.trie = DeviceTrie(trie, vocabulary, model.device)
        self.trie.batch_tokens = decoding_positions(model)
        self.longest_prompt = min(LONGEST_PROMPT, model.config.max_position_embeddings) - trie.levels - 1

    @classmethod
    def load(cls, checkpoint: Path, trie: Trie) -> TorchEngine:
        """From a checkpoint folder; on the GPU where there is one. Raises as `require_safe`."""
        require_safe(checkpoint)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(_model(checkpoint).to(device), trie, _vocabulary(checkpoint, trie))

    def generate(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray]:
        leaves, log_probs = beam_search(self.model, prompts, self.trie, width, read=self.read)
        return leaves.cpu().numpy(), log_probs.cpu().numpy()

    def generate_and_judge(self, prompts: Ragged, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        leaves, log_probs, verdict = judged_beam_search(self.model, prompts, self.trie, width, read=self.read)
        return leaves.cpu().numpy(), log_probs.cpu().numpy(), verdict.cpu().numpy()

    @torch.no_grad()
    def score(self, prompts: Ragged, leaves: np.ndarray) -> np.ndarray:
        scores = np.full(leaves.shape, -np.inf, np.float32)
        for rows, batch, given in self._batches(prompts, leaves, self.trie.levels - 1):
            steps, _ = completion_log_probs(self.model, batch, given, self.trie, self.read)
            scores[rows] = steps.sum(-1).cpu().numpy()
        return np.where(leaves >= 0, scores, -np.inf)

    @torch.no_grad()
    def score_and_judge(self, prompts: Ragged, leaves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores, judged = np.zeros(leaves.shape, np.float32), np.zeros(leaves.shape, np.float32)
        for rows, batch, given in self._batches(prompts, leaves, self.trie.levels):
            log_probs, verdict = judged_log_probs(self.model, batch, given, self.trie, self.read)
            scores[rows], judged[rows] = log_probs.cpu().numpy(), verdict.cpu().numpy()
        return np.where(leaves >= 0, scores, -np.inf), judged

    def _batches(
        self, prompts: Ragged, leaves: np.ndarray, depth: int
    ) -> Iterator[tuple[np.ndarray, Ragged, torch.Tensor]]:
        """Rows, their prompts and their leaves, few enough to be computed at once with `depth` positions a leaf."""
        for rows in length_batches(prompts.lengths, leaves.shape[1] * depth, self.trie.batch_tokens):
            yield rows, prompts.take(rows), torch.as_tensor(leaves[rows], device=self.trie.device)


class VllmEngine(TorchEngine):
    """The same search with vLLM's model, which packs prompts where that of transformers pads them."""

    def __init__(self, checkpoint: Path, trie: Trie, settings: GenerateSettings, threads: int) -> None:
        """Starts the engine: seconds. Raises `MissingDependencyError` without vLLM, and `ConfigError` for a model of
        which it computes something else than transformers."""
        vocabulary = _vocabulary(checkpoint, trie)
        check_trie(trie, vocabulary)
        model = VllmModel(checkpoint, settings, threads)
        model.take(_model(checkpoint), vocabulary.code_tokens(trie.semantic_ids[0]).astype(np.int32))
        super().__init__(model, trie, vocabulary, model.read)
        # After the prompt come an ID and the kind that is asked for.
        self.longest_prompt = model.longest - trie.levels - 1


def _vocabulary(checkpoint: Path, trie: Trie) -> Vocabulary:
    from transformers import AutoTokenizer

    return Vocabulary.of(AutoTokenizer.from_pretrained(checkpoint), trie.levels, trie.codes)


def _model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=True).eval()
