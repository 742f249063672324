"""How near the device's limits a training step and the decoding of a night come: the parts that need no Ray and no vLLM.

    python benchmarks/gpu.py                     # on an accelerator: at most four minutes; writes benchmarks/gpu.json
    python benchmarks/gpu.py --tiny --out F      # the same cells at tiny sizes, on whatever device is there: seconds

Weights are random, at the shapes of Qwen2.5-0.5B and Qwen3-1.7B and of the example's model; nothing is downloaded. What
is timed is what trains and generates: `TrainingLoop`, `TorchEngine`. All figures are of one run. A clock is read once
the device is idle; after one warm-up a cell repeats until its share of the time is used, and the median counts. A cell
that fails or comes too late says why in its place, and what is measured is written after every cell.

What is counted, beside what the same run measured of one large matrix product and of one copy on the device:

    matrices      = layers (H (q + 2 k) + q H + 3 H I)        H hidden size, I intermediate size; q, k: query heads and
                                                             key heads times the head size
    forward(n, s) = 2 matrices n + 4 layers q s              n positions, s: how many they attend to, summed
    head(n, V)    = 2 H V n                                  V rows of the head, at n positions
    supervised    = 3 (forward(n, n (length + 1) / 2) + head(targets, whole vocabulary))
    GRPO          = 3 (forward + head) once over every prompt and its completions, however often the step computes them
    prompts only  = forward over the prompts
    decoding      = prompts only + forward over L W positions, each attending to its prompt and to its own codes
    bytes, decoding = (1 + L) matrices + (1 + L) keys and values of the prompts: once written, L times read

Padding, the reference, sampling and repeated prompts count as nothing: they are what keeps a step from the ceiling.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from conrec.blocklist.engines import TorchEngine
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.policy.decoding import (
    DeviceTrie,
    decoder_and_head,
    judged_beam_search,
    length_batches,
    step_log_probs,
)
from conrec.policy.loop import TrainingLoop
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, JudgedPairs, TrainingData
from conrec.policy.supervised import supervised_loss
from conrec.policy.tasks import Examples
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged

HERE = Path(__file__).parent
LEVELS = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Cell = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only model of a `family` of transformers."""

    name: str
    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int

    @property
    def matrices(self) -> int:
        """Weights that every position is multiplied by, the head left out."""
        query, key = self.heads * self.head_size, self.key_heads * self.head_size
        return self.layers * (
            self.hidden * (query + 2 * key) + query * self.hidden + 3 * self.hidden * self.intermediate
        )

    def forward(self, positions: float, seen: float) -> float:
        """Floating-point operations of the layers."""
        return 2 * self.matrices * positions + 4 * self.layers * self.heads * self.head_size * seen

    def head(self, positions: float, rows: int) -> float:
        """Floating-point operations of so many rows of the output head."""
        return 2 * self.hidden * rows * positions

    def prompts(self, count: int, length: int) -> float:
        """`forward` over so many prompts."""
        return self.forward(count * length, count * length * (length + 1) / 2)

    def beams(self, count: int, length: int, width: int, levels: int) -> float:
        """`forward` over the first `levels` codes of `width` completions of each prompt."""
        each = width * sum(length + level + 1 for level in range(levels))
        return self.forward(count * width * levels, count * each)

    def cache(self, tokens: int, size: int) -> float:
        """Bytes of the keys and values of so many tokens."""
        return 2 * self.layers * self.key_heads * self.head_size * size * tokens


@dataclass(frozen=True)
class Plan:
    """What is measured, on a catalogue of so many items, and how long at most; `users`: in a batch at most."""

    groups: tuple[Group, ...]
    items: int
    codes: int
    users: int
    matrix: int
    copy_mib: int
    cell_seconds: float
    seconds: float


@dataclass(frozen=True)
class Group:
    """The cells of one model in one precision.

    `trained`: (prompt length, tokens a step, group sizes); `asked`: (prompt length, widths); `budgets`: positions
    computed at a time that are compared, with the first prompt length and the middle width of `asked`.
    """

    shape: Shape
    dtype: str
    trained: tuple[tuple[int, int, tuple[int, ...]], ...]
    asked: tuple[tuple[int, tuple[int, ...]], ...]
    budgets: tuple[int, ...] = ()
    profiled: bool = False


EXAMPLE = Shape("example 1M", "llama", 128, 384, 4, 4, 4, 32, 1024)
HALF = Shape("0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, 151_936)
LARGE = Shape("1.7B", "qwen3", 2048, 6144, 28, 16, 8, 128, 151_936)
WIDTHS = (20, 100, 256)
FULL = Plan(
    groups=(
        Group(EXAMPLE, "float32", ((64, 2048, (64,)),), ((64, (20, 100)),)),
        Group(EXAMPLE, "bfloat16", ((64, 2048, (64,)),), ((64, (100,)),)),
        Group(
            HALF,
            "bfloat16",
            ((512, 16_384, (16, 64)), (1024, 16_384, (16,))),
            ((1000, WIDTHS), (256, WIDTHS), (5000, WIDTHS)),
            (8_192, 32_768, 65_536, 131_072),
            True,
        ),
        Group(
            LARGE,
            "bfloat16",
            ((512, 8_192, (16,)),),
            ((1000, WIDTHS), (256, WIDTHS), (5000, WIDTHS)),
            (8_192, 32_768, 65_536, 131_072),
            True,
        ),
        Group(HALF, "float32", ((512, 8_192, (16,)),), ((1000, (100,)), (256, (100,)), (5000, (100,)))),
    ),
    items=100_000,
    codes=256,
    users=100_000,
    matrix=8192,
    copy_mib=2048,
    cell_seconds=3.0,
    seconds=200.0,
)
_SMALL = Shape("tiny", "qwen3", 32, 48, 2, 4, 2, 16, 160)
TINY = Plan(
    groups=(
        Group(_SMALL, "float32", ((16, 64, (4,)),), ((16, (2, 5)),), (64, 256), True),
        Group(_SMALL, "bfloat16", ((16, 64, (4,)),), ((24, (5,)),)),
    ),
    items=200,
    codes=16,
    users=8,
    matrix=128,
    copy_mib=1,
    cell_seconds=0.05,
    seconds=60.0,
)


def main() -> None:
    """Measures the plan, writes the JSON after every cell, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--out", type=Path, help="the JSON to write; benchmarks/gpu.json unless --tiny")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no accelerator here, and on a CPU these shapes take hours: add --tiny, or run it where one is")
    out = given.out or (None if given.tiny else HERE / "gpu.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table(Run(TINY if given.tiny else FULL, device, out).measured())


@dataclass
class Run:
    """One run of a plan: its clock, its ceilings, and what was measured so far."""

    plan: Plan
    device: torch.device
    out: Path | None
    document: dict[str, Any] = field(default_factory=dict)

    def measured(self) -> dict[str, Any]:
        """The document, every cell of the plan in it."""
        self.began = time.perf_counter()
        self.document = {**machine(self.device), "ceilings": {}, "cells": []}
        for dtype in dict.fromkeys(group.dtype for group in self.plan.groups):
            self.document["ceilings"][dtype] = {"flops": matrix_ceiling(self, dtype)}
        self.document["ceilings"]["bytes_per_second"] = copy_ceiling(self)
        self.trie = Trie.build(
            np.random.default_rng(0).integers(0, self.plan.codes, (self.plan.items, LEVELS)), self.plan.codes
        )
        for group in self.plan.groups:
            self._group(group)
        return self.document

    def _group(self, group: Group) -> None:
        what = {"model": group.shape.name, "dtype": group.dtype}
        built: list[Bench] = []
        self.cell(what | {"work": "build"}, lambda: built.append(Bench.build(self, group)) or {})
        # A model that cannot be built still leaves a row for every cell, with the reason.
        bench = built[0] if built else None

        def asked(work: Callable[[Bench], Cell]) -> Callable[[], Cell]:
            def ask() -> Cell:
                if bench is None:
                    raise RuntimeError("the model was not built")
                return work(bench)

            return ask

        for length, tokens, sizes in group.trained:
            cell = what | {"prompt_tokens": length}
            self.cell(cell | {"work": "forward and backward"}, asked(lambda b: b.limit(length, tokens)))  # noqa: B023
            self.cell(cell | {"work": "supervised step"}, asked(lambda b: b.supervised(length, tokens)))  # noqa: B023
            for size in sizes:
                work = asked(lambda b: b.grpo(length, tokens, size))  # noqa: B023
                self.cell(cell | {"work": "GRPO step", "group": size}, work)
        if bench is not None:
            bench.rest()
        for length, widths in group.asked:
            cell = what | {"prompt_tokens": length}
            for width in widths:
                work = asked(lambda b: b.decoding(length, width))  # noqa: B023
                self.cell(cell | {"work": "decoding with verdicts", "width": width}, work)
        length, widths = group.asked[0]
        cell = what | {"prompt_tokens": length, "width": widths[len(widths) // 2]}
        for budget in group.budgets:
            work = asked(lambda b: b.budget(length, cell["width"], budget))  # noqa: B023
            self.cell(cell | {"work": "decoding by positions at a time", "positions": budget}, work)
        if group.profiled:
            work = asked(lambda b: b.kernels(length, cell["width"]))
            self.cell(cell | {"work": "kernels of decoding"}, work)

    def cell(self, what: Cell, work: Callable[[], Cell]) -> None:
        """Measures one cell and writes all there is; a failure is its figure."""
        spent = time.perf_counter() - self.began
        if spent > self.plan.seconds:
            figures: Cell = {"failed": f"not begun: the run's {self.plan.seconds:g} s were over"}
        else:
            figures = self._tried(work)
            figures["took_seconds"] = round(time.perf_counter() - self.began - spent, 2)
        self.document["cells"].append(what | figures)
        self.document["seconds"] = round(time.perf_counter() - self.began, 1)
        print(line(what | figures), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.document, indent=2) + "\n")

    def _tried(self, work: Callable[[], Cell]) -> Cell:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = work()
        except torch.OutOfMemoryError as error:
            figures = {"failed": f"out of memory: {str(error).splitlines()[0]}"}
        except Exception as error:  # the next cell may well run
            figures = {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        if cuda:
            figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        # What a failed cell held goes only once its traceback is gone.
        self.free()
        return figures

    def free(self) -> None:
        """Gives back what nothing refers to."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def idle(self) -> float:
        """The time, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], repeats: int = 20) -> Cell:
        """Median of as many repeats as fit into a cell, at least one, after one that is not counted."""
        work()
        taken: list[float] = []
        began = self.idle()
        while len(taken) < repeats and (not taken or self.idle() - began < self.plan.cell_seconds):
            start = self.idle()
            work()
            taken.append(self.idle() - start)
        return {"seconds": median(taken), "repeats": len(taken)}

    def shares(self, figures: Cell, dtype: str, flops: float, moved: float = 0.0) -> Cell:
        """Operations and bytes a second, and their shares of the ceilings."""
        ceilings, seconds = self.document["ceilings"], figures["seconds"]
        figures |= {"flops": flops / seconds, "flops_share": flops / seconds / ceilings[dtype]["flops"]}
        if moved:
            share = moved / seconds / ceilings["bytes_per_second"]
            figures |= {"bytes_per_second": moved / seconds, "bytes_share": share}
        return figures


class Enough(Exception):
    """The steps that a cell needs were taken."""


@dataclass
class Bench:
    """A model on the device, with a catalogue, and what can be asked of both."""

    run: Run
    group: Group
    model: Any
    vocabulary: Vocabulary
    engine: TorchEngine
    known: dict[int, float] = field(default_factory=dict)

    @classmethod
    def build(cls, run: Run, group: Group) -> Bench:
        """Random weights, made on the device."""
        shape, codes = group.shape, run.plan.codes
        torch.manual_seed(0)
        model = random_model(shape, DTYPES[group.dtype], run.device)
        vocabulary = Vocabulary(LEVELS, codes, shape.vocabulary - LEVELS * codes, *range(8))
        return cls(run, group, model, vocabulary, TorchEngine(model, run.trie, vocabulary))

    def rest(self) -> None:
        """Gives back the gradients, before the device is filled with prompts."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        self.run.free()

    def tokens(self, count: int, length: int) -> Ragged:
        """Rows of random code tokens."""
        first, end = self.vocabulary.first_code_token, self.group.shape.vocabulary
        values = np.random.default_rng(1).integers(first, end, count * length).astype(np.int32)
        return Ragged.from_lengths(values, np.full(count, length))

    # ---- training ----

    def limit(self, length: int, tokens: int) -> Cell:
        """One forward and backward over whole rows, the last ID their target: what a GRPO step is compared with."""

        def measure(tokens: int) -> Cell:
            count = max(1, tokens // length)
            rows = self.tokens(count, length)
            target = np.tile(np.arange(length) >= length - LEVELS, count)
            examples = Examples(rows, target)
            self.model.train()

            def step() -> None:
                self.model.zero_grad(set_to_none=True)
                supervised_loss(self.model, examples)[0].backward()

            figures = self.run.seconds(step) | {"tokens": count * length}
            shape = self.group.shape
            flops = 3 * (shape.prompts(count, length) + shape.head(count * LEVELS, shape.vocabulary))
            figures["tokens_per_second"] = count * length / figures["seconds"]
            self.known[length] = figures["tokens_per_second"]
            return self.run.shares(figures, self.group.dtype, flops)

        return self._fitting(measure, tokens)

    def supervised(self, length: int, tokens: int) -> Cell:
        """Steps of the loop on whole rows, every token a target, as the events of a warm-up are."""

        def measure(tokens: int) -> Cell:
            count, shape = max(1, tokens // length), self.group.shape
            rows = self.tokens(count * 8, length)
            examples = Examples(rows, np.tile(np.arange(length) > 0, count * 8))
            figures = self._steps({"warm_up": examples}, {}, tokens=count * length, group=2, prompts=1)
            figures |= {"tokens": count * length, "tokens_per_second": count * length / figures["seconds"]}
            flops = 3 * (shape.prompts(count, length) + shape.head(count * (length - 1), shape.vocabulary))
            return self._against_limit(self.run.shares(figures, self.group.dtype, flops), length)

        return self._fitting(measure, tokens)

    def grpo(self, length: int, tokens: int, group: int) -> Cell:
        """Steps of the loop on prompts of one length, with a reference: sampled, rewarded, one update."""

        def measure(tokens: int) -> Cell:
            count, shape = max(1, tokens // (length + LEVELS * group)), self.group.shape
            random, one = np.random.default_rng(2), np.full(count * 4, 2)
            leaves = [random.integers(0, len(self.run.trie), count * 8).astype(np.int32) for _ in range(2)]
            samples = GrpoSamples(
                self.tokens(count * 4, length),
                Ragged.from_lengths(leaves[0], one),
                np.ones(count * 8, np.float32),
                Ragged.from_lengths(leaves[1], one),
            )
            figures = self._steps({}, {"all": samples}, tokens=tokens, group=group, prompts=count)
            packed = count * (length + LEVELS * group)
            figures |= {"prompts": count, "tokens": packed, "tokens_per_second": packed / figures["seconds"]}
            computed = shape.prompts(count, length) + shape.beams(count, length, group, LEVELS - 1)
            flops = 3 * (computed + shape.head(count * (1 + group * (LEVELS - 1)), self.run.plan.codes))
            return self._against_limit(self.run.shares(figures, self.group.dtype, flops), length)

        return self._fitting(measure, tokens)

    def _against_limit(self, figures: Cell, length: int) -> Cell:
        """How many times the limit a token takes, where this run measured it."""
        if length in self.known:
            figures["times_forward_and_backward"] = self.known[length] / figures["tokens_per_second"]
        return figures

    def _fitting(self, measure: Callable[[int], Cell], tokens: int) -> Cell:
        """At the largest half, quarter ... of the tokens that fits; what did not is noted."""
        tried: list[int] = []
        while True:
            try:
                return measure(tokens) | ({"out_of_memory_at_tokens": tried} if tried else {})
            except torch.OutOfMemoryError:
                if len(tried) == 3:
                    raise
            tried.append(tokens)
            tokens //= 2
            self.model.zero_grad(set_to_none=True)
            self.run.free()

    def _steps(
        self, tasks: dict[str, Examples], stages: dict[str, GrpoSamples], tokens: int, group: int, prompts: int
    ) -> Cell:
        """Seconds between the ends of a loop's steps, the first two left out."""
        run, none = self.run, Ragged.from_lengths(np.zeros(0, np.int32), np.zeros(0, np.int64))
        clock: list[float] = []

        def report(row: dict[str, Any]) -> None:
            clock.append(run.idle())
            if len(clock) > 3 and (clock[-1] - clock[2] > run.plan.cell_seconds or len(clock) == 22):
                raise Enough

        loop = TrainingLoop(
            self.model,
            TrainingData(
                tasks,
                stages,
                HeldOutQuestions(none, np.zeros((0, 4), np.int64), np.zeros(0, np.int64)),
                none,
                np.zeros(0, np.int64),
                JudgedPairs(none, np.zeros(0, bool)),
            ),
            self.engine.trie,
            torch.zeros(len(run.trie), 1),
            torch.from_numpy(run.trie.semantic_ids),
            training_config(run.plan.codes, tokens, group, prompts),
            lambda leaves, log_probs: {},
            report,
            lambda state: None,
        )
        try:
            loop.run()
        except Enough:
            pass
        steps = np.diff(clock[2:] if len(clock) > 3 else clock).tolist()
        return {"seconds": median(steps), "repeats": len(steps)}

    # ---- decoding ----

    def users(self, length: int, width: int) -> int:
        """What fits into one batch of the engine."""
        return max(1, min(self.run.plan.users, self.engine.trie.batch_tokens // (length + LEVELS * width)))

    def decoding(self, length: int, width: int) -> Cell:
        """One full batch of the engine, beside the prompts alone and the trie's part of it."""
        run, shape, size = self.run, self.group.shape, DTYPES[self.group.dtype].itemsize
        count = self.users(length, width)
        prompts = self.tokens(count, length)
        alone = run.seconds(lambda: self.prompts_only(prompts))
        figures = run.seconds(lambda: self.engine.generate_and_judge(prompts, width)) | {"users": count}
        figures["users_per_second"] = count / figures["seconds"]
        figures["prompts_only_users_per_second"] = count / alone["seconds"]
        figures["share_of_prompts_only"] = alone["seconds"] / figures["seconds"]
        prefill = shape.prompts(count, length)
        figures["prompts_only_flops_share"] = run.shares(alone, self.group.dtype, prefill)["flops_share"]
        flops = prefill + shape.beams(count, length, width, LEVELS)
        # No decoding can be nearer to prompts only than this, if operations alone counted.
        figures["share_of_prompts_only_by_flops"] = prefill / flops
        moved = (1 + LEVELS) * (shape.matrices * size + shape.cache(count * length, size))
        run.shares(figures, self.group.dtype, flops, moved)
        figures["trie_seconds"] = self.trie_seconds(count, width)
        figures["trie_share"] = figures["trie_seconds"] / figures["seconds"]
        return figures

    def prompts_only(self, prompts: Ragged) -> None:
        """The prompts and their keys and values, as the engine's search begins; nothing is generated."""
        from transformers import DynamicCache

        decoder, _ = decoder_and_head(self.model)
        with torch.no_grad():
            for rows in length_batches(prompts.lengths, 0, self.engine.trie.batch_tokens):
                tokens = torch.as_tensor(prompts.take(rows).padded(0), dtype=torch.int64, device=self.run.device)
                cache = DynamicCache(config=decoder.config)
                decoder(input_ids=tokens, past_key_values=cache, use_cache=True)

    def trie_seconds(self, count: int, width: int) -> float:
        """What a search asks of the trie, all levels: children, and log-probabilities renormalised over them.

        Softmax included, which a search without a trie needs too: an upper bound.
        """
        trie: DeviceTrie = self.engine.trie
        random, device = torch.Generator().manual_seed(0), self.run.device
        levels = []
        for level in range(LEVELS):
            shape = (count, min(width, trie.node_counts[level]) if level else 1)
            nodes = torch.randint(trie.node_counts[level], shape, generator=random).to(device)
            levels.append((nodes, torch.randn(*shape, trie.codes, device=device)))

        def ask() -> None:
            for level, (nodes, logits) in enumerate(levels):
                trie.children(level, nodes)
                step_log_probs(logits, nodes, level, trie)

        return self.run.seconds(ask)["seconds"]

    def budget(self, length: int, width: int, positions: int) -> Cell:
        """Users a second with so many positions at a time; users enough for one batch of any of them."""
        count = max(1, max(self.group.budgets) // (length + LEVELS * width))
        prompts = self.tokens(count, length)
        figures = self.run.seconds(lambda: judged_beam_search(self.model, prompts, self.engine.trie, width, positions))
        return figures | {"users": count, "users_per_second": count / figures["seconds"]}

    def kernels(self, length: int, width: int) -> Cell:
        """Where the device's time goes in one full batch, by kernel, and how much of the time it works at all."""
        from torch.profiler import ProfilerActivity, profile

        prompts = self.tokens(self.users(length, width), length)
        self.engine.generate_and_judge(prompts, width)
        cuda = self.run.device.type == "cuda"
        start = self.run.idle()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
            self.engine.generate_and_judge(prompts, width)
            seconds = self.run.idle() - start
        spent = {
            event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
            for event in found.key_averages()
        }
        total = sum(spent.values())
        most = sorted(spent.items(), key=lambda one: -one[1])[:12]
        return {
            "seconds": seconds,
            "busy_share": total / seconds,
            "kernels": [{"name": name[:90], "share": round(part / total, 4)} for name, part in most],
        }


def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of this shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": shape.family != "llama",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model(shape.family, **sizes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def training_config(codes: int, tokens: int, group: int, prompts: int) -> Config:
    """Settings of a loop that takes a dozen steps and measures nothing else."""
    stage = {"name": "all", "blocks": ["negatives"], "steps": 22, "beta": 0.2}
    return Config.model_validate(
        {
            "root": "unused",
            "interactions": {"path": "unused"},
            "items": {"path": "unused"},
            "timeline": {"cut": "2026-01-01T00:00:00Z"},
            "quantizer": {"levels": LEVELS, "codes": codes},
            "supervised": {
                "translation_epochs": 0,
                "alignment_epochs": 0,
                "warmup_epochs": 3,
                "event_dropout": 0,
                "tokens_per_step": tokens,
                "learning_rate": 1e-6,
            },
            "grpo": {"group_size": group, "prompts_per_step": prompts, "learning_rate": 1e-6, "stages": [stage]},
            "train": {"checkpoint_every": 1_000_000},
        }
    )


def matrix_ceiling(run: Run, dtype: str) -> float:
    """Operations a second of one large square product."""
    size = run.plan.matrix
    left, right = (torch.randn(size, size, device=run.device).to(DTYPES[dtype]) for _ in range(2))
    figures = run.seconds(lambda: torch.mm(left, right))
    return 2 * size**3 / figures["seconds"]


def copy_ceiling(run: Run) -> float:
    """Bytes a second, read and written, of one copy on the device."""
    source = torch.zeros(run.plan.copy_mib * 2**20, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / run.seconds(lambda: target.copy_(source))["seconds"]


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures are from, and of which code."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "device_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
        "cores": os.cpu_count(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
    }


def commit() -> str | None:
    """Of the checkout, `+` behind it where files differ; None where there is no checkout."""
    git = ["git", "-C", str(HERE)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def line(cell: Cell) -> str:
    """One cell in words, as it ends."""
    named = " ".join(str(cell[key]) for key in ("model", "dtype", "work") if key in cell)
    sizes = " ".join(f"{key} {cell[key]}" for key in ("prompt_tokens", "group", "width", "positions") if key in cell)
    if "failed" in cell:
        return f"{named}; {sizes}: {cell['failed']}"
    shown = ("seconds", "users_per_second", "tokens_per_second", "share_of_prompts_only", "times_forward_and_backward")
    shown += ("flops_share", "bytes_share", "trie_share", "busy_share")
    return f"{named}; {sizes}: " + ", ".join(f"{key} {cell[key]:.4g}" for key in shown if key in cell)


def table(document: dict[str, Any]) -> None:
    """What was measured, as Markdown."""
    columns = {
        "ms": ("seconds", 1e3),
        "tokens/s": ("tokens_per_second", 1),
        "users/s": ("users_per_second", 1),
        "of prompts only": ("share_of_prompts_only", 1),
        "times the limit": ("times_forward_and_backward", 1),
        "of FLOP/s": ("flops_share", 1),
        "of bytes/s": ("bytes_share", 1),
        "trie": ("trie_share", 1),
        "GiB": ("peak_gib", 1),
    }
    print(f"\n{document['device']}, ceilings {document['ceilings']}, {document['seconds']} s in all\n")
    print(f"| cell | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for cell in document["cells"]:
        if cell["work"] == "build" and "failed" not in cell:
            continue
        sizes = [str(cell[key]) for key in ("prompt_tokens", "group", "width", "positions") if key in cell]
        name = f"{cell['model']} {cell['dtype']} {cell['work']} {' × '.join(sizes)}"
        if "failed" in cell:
            print(f"| {name}: {cell['failed']} |{' |' * len(columns)}")
            continue
        values = [f"{cell[key] * scale:.4g}" if key in cell else "" for key, scale in columns.values()]
        print(f"| {name} | {' | '.join(values)} |")


if __name__ == "__main__":
    main()
