"""How near its limit a training step comes: one forward and backward over the same tokens, packed without padding.

    python benchmarks/training_step.py             # one core, ten minutes; writes benchmarks/training_step.json
    python benchmarks/training_step.py --tiny --out F    # tiny sizes, seconds

Two models with random weights, which take the same time as trained ones: that of examples/kuairand, and SmolLM2-135M's
shape with adapters of rank 16. Prompts have 64, 256 or 1,024 tokens on average, of very different lengths as users have
very different histories. The limit is a supervised forward and backward over rows of equal length, as many tokens in
all and as many targets: a prompt and three tokens for each completion that is drawn, P + 3 G, where a trainer that
knows no shared prompts computes G (P + 3). A step also draws the completions, asks the reference about them (beta > 0)
and steps the optimiser. Step and limit take turns; the best of the rounds counts, in seconds of one thread's CPU, since
whoever else runs on the machine is none of its business, and the ratio is that of the two.
`positions_ratio` stands beside the stricter limit, that leaves out each completion's last token, which nobody needs to
compute.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch

from conrec.catalogue.trie import Trie
from conrec.config import Config, load_settings
from conrec.policy.decoding import DeviceTrie
from conrec.policy.grpo import Grpo
from conrec.policy.learner import Learner, Start
from conrec.policy.masters import Masters
from conrec.policy.model import build_model, trainable, word_tokenizer
from conrec.policy.optimiser import WEIGHT_DECAY, Optimiser
from conrec.policy.rewards import Rewarder
from conrec.policy.samples import GrpoSamples
from conrec.policy.supervised import Supervised, batches, supervised_loss
from conrec.policy.tasks import Examples, drop_events
from conrec.ragged import Ragged

HOME = Path(__file__).parents[1]
EXAMPLE = HOME / "examples" / "kuairand"
LEVELS, EVENT, BETA = 3, 4, 0.2
PIECE = 2048
"""Tokens of the limit's forwards: with twice or half as many it is slower."""
Cell = tuple[str, int, int, int, int]
"""Kind, tokens of a prompt, group size, rows, rounds."""
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Measures every cell and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    document: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1, "models": {}}
    for name, (trained, plan) in models(given.tiny).items():
        cells = {}
        for kind, length, group, rows, rounds in plan:
            label = f"{kind}, {length} tokens" + (f", G {group}" if group else "")
            cells[label] = measured(trained, kind, length, group, rows, rounds)
            print(f"{name:24}{label:32}{json.dumps(cells[label])}", flush=True)
        parameters = sum(parameter.numel() for parameter in trained.learner.model.parameters())
        document["models"][name] = {"parameters": parameters, "steps": cells}
    given.out.write_text(json.dumps(document, indent=2) + "\n")


def models(tiny: bool) -> dict[str, tuple[Trained, list[Cell]]]:
    """Name -> steps of a model, and its cells: kind, tokens of a prompt, group size, rows, rounds."""
    texts = parquet.read_table(EXAMPLE / "items.parquet", columns=["text"])["text"].to_pylist()
    settings = ["model.hidden_size=32", "model.heads=1", "model.layers=2"] if tiny else []
    small = load_settings(EXAMPLE / "conrec.toml", settings)
    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    if tiny:
        lengths, groups, rows, rounds, few = (64,), (4,), 3, 1, 2
    else:
        lengths, groups, rows, rounds, few = (64, 256, 1024), (16, 64), 32, 3, 4

    def plan(most: int, groups: tuple[int, ...], rounds: int) -> list[Cell]:
        # As many tokens in prompts of 1,024 as in those of 256.
        size = {length: max(1, min(most, 256 * most // length)) for length in lengths}
        cells = [("supervised", length, 0, size[length], rounds) for length in lengths]
        return cells + [("grpo", length, group, size[length], rounds) for length in lengths for group in groups]

    found = {"example": (steps_of(small, texts), plan(rows, groups, rounds))}
    with tempfile.TemporaryDirectory() as folder:
        config = adapted(small, texts, TINY if tiny else SMOLLM2, Path(folder))
        found["SmolLM2-135M, LoRA r 16"] = (steps_of(config, texts), plan(few, groups, 1))
    return found


def adapted(config: Config, texts: list[str], shape: dict[str, Any], folder: Path) -> Config:
    """Settings of a model of a shape with random weights, in a checkpoint of its own, and of adapters on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    word_tokenizer(texts, max_words=64).save_pretrained(folder)
    document = config.model_dump(mode="json")
    return Config.model_validate(document | {"model": {"name_or_path": str(folder)}, "lora": {"rank": 16}})


@dataclass(frozen=True)
class Trained:
    """What the steps of a model are taken with."""

    config: Config
    learner: Learner
    rewarder: Rewarder
    tokenizer: Any


def steps_of(config: Config, texts: list[str]) -> Trained:
    """A fresh model over a trie of as many leaves as the example has."""
    model, tokenizer, vocabulary = build_model(config, texts)
    codes = config.quantizer.codes
    ids = np.unique(np.random.default_rng(0).integers(0, codes, (5372, LEVELS)).astype(np.int32), axis=0)
    trie = Trie.build(ids, codes)
    vectors = torch.nn.functional.normalize(torch.randn(len(ids), 8), dim=1)
    rewarder = Rewarder(vectors, torch.from_numpy(trie.semantic_ids), "similarity", config.grpo.gamma)
    masters = Masters(dict(sorted(trainable(model).items())), {})
    return Trained(config, Learner(model, DeviceTrie(trie, vocabulary), masters, config.train), rewarder, tokenizer)


def measured(trained: Trained, kind: str, length: int, group: int, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step and of its limit, which take turns."""
    ours, tokens, positions, targets = (
        supervised(trained, length, rows) if not group else grpo(trained, length, group, rows)
    )
    trained.learner.model.train(not group)
    works = {"step": ours, "limit": packed(trained, tokens, targets, length + LEVELS * group)}
    if group:
        works["strict"] = packed(trained, positions, targets, length + (LEVELS - 1) * group)
    best = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            began = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - began)
    cell = {
        "tokens": tokens,
        "step_seconds": round(best["step"], 4),
        "limit_seconds": round(best["limit"], 4),
        "ratio": round(best["step"] / best["limit"], 3),
    }
    if group:
        cell["positions_ratio"] = round(best["step"] / best["strict"], 3)
        cell["tokens_without_shared_prompts"] = rows * group * (length + LEVELS)
    return cell


def supervised(trained: Trained, length: int, rows: int) -> tuple[Callable[[], Any], int, int, int]:
    """A warm-up step: one of a pool's batches of like length, a quarter of its events dropped."""
    pool = 64 * rows
    events = np.maximum(1, lengths_of(pool, length) // EVENT)
    sizes = 1 + events * EVENT
    is_target = np.ones(int(sizes.sum()), bool)
    is_target[np.cumsum(sizes) - sizes] = False
    examples = Examples(random_tokens(trained, sizes), is_target)
    every = batches(examples, rows * length, 1.0, seed=0)
    # Neither the shortest histories nor the longest.
    batch = examples.take(min(every, key=lambda one: abs(sizes[one].max() - length)))
    dropped = drop_events(batch, EVENT, trained.config.supervised.event_dropout, np.random.default_rng(0))
    optimiser, supervised = Optimiser(trained.learner.masters, WEIGHT_DECAY, {}), Supervised(trained.learner)

    def step() -> None:
        supervised.step(dropped, optimiser, 0.0)

    tokens = len(dropped.tokens.values)
    return step, tokens, tokens, int(dropped.is_target.sum())


def grpo(trained: Trained, length: int, group: int, rows: int) -> tuple[Callable[[], Any], int, int, int]:
    """A GRPO step over prompts of very different lengths."""
    prompts = random_tokens(trained, lengths_of(rows, length))
    computed = int(prompts.lengths.sum())
    completions = rows * group
    return (
        grpo_of(trained, prompts, group),
        computed + LEVELS * completions,
        computed + (LEVELS - 1) * completions,
        LEVELS * completions,
    )


def grpo_of(trained: Trained, prompts: Ragged, group: int) -> Callable[[], None]:
    """A GRPO step; every draw is another."""
    settings = trained.config.grpo.model_copy(update={"group_size": group, "min_reward_range": 0.0})
    algorithm = Grpo(trained.learner, trained.rewarder, settings)
    rows, random = len(prompts), np.random.default_rng(0)
    truth = Ragged.from_lengths(random.integers(0, trained.learner.trie.leaf_count, 3 * rows), np.full(rows, 3))
    samples = GrpoSamples(prompts, truth, np.ones(3 * rows, np.float32), truth.take(np.arange(rows)[::-1]))
    optimiser = Optimiser(trained.learner.masters, 0.0, {})
    start = Start(trained.learner.masters.copies(), BETA)

    def step() -> None:
        algorithm.step(samples, start, random, optimiser, 0.0)

    return step


def packed(trained: Trained, tokens: int, targets: int, length: int) -> Callable[[], Any]:
    """Forwards and backwards over rows of one length, nothing of them padding, in the pieces that are fastest here."""
    pieces = -(-tokens // PIECE)
    rows = max(1, round(tokens / pieces / length))
    sizes = np.full(rows, round(tokens / pieces / rows))
    is_target = np.zeros(int(sizes.sum()), bool)
    inner = np.setdiff1d(np.arange(len(is_target)), np.cumsum(sizes) - sizes)
    wanted = min(round(targets / pieces), len(inner))
    is_target[inner[np.linspace(0, len(inner) - 1, wanted).astype(int)]] = True
    examples = Examples(random_tokens(trained, sizes), is_target)

    def work() -> None:
        trained.learner.masters.clear()
        for _ in range(pieces):
            supervised_loss(trained.learner.model, examples)[0].backward()

    return work


def lengths_of(rows: int, mean: int) -> np.ndarray:
    """Multiples of a cache block, as prompts are: a long tail around the mean, the same every time."""
    drawn = np.random.default_rng(0).gamma(1.5, mean / 1.5, rows)
    blocks = np.clip(np.round(drawn / 32), 1, 4 * mean // 32).astype(np.int64)
    return 32 * blocks


def random_tokens(trained: Trained, lengths: np.ndarray) -> Ragged:
    """Codes of any level."""
    first = trained.learner.trie.first_code_token
    last = first + trained.learner.trie.levels * trained.learner.trie.codes
    tokens = np.random.default_rng(0).integers(first, last, int(lengths.sum()))
    return Ragged.from_lengths(tokens.astype(np.int32), lengths)


if __name__ == "__main__":
    main()
