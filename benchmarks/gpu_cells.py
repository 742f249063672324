"""What `benchmarks/gpu.py` times: steps of `TrainingLoop` and batches of `TorchEngine`, on models of random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from gpu_clock import Cell, Clock
from gpu_plan import DTYPES, LEVELS, Group, Plan, random_model

from conrec.blocklist.engines import TorchEngine
from conrec.catalogue.trie import Trie
from conrec.config import Config
from conrec.policy.decoding import DeviceTrie, judged_beam_search, length_batches, step_log_probs
from conrec.policy.head import decoder_and_head
from conrec.policy.loop import TrainingLoop
from conrec.policy.samples import GrpoSamples, HeldOutQuestions, JudgedPairs, TrainingData
from conrec.policy.supervised import supervised_loss
from conrec.policy.tasks import Examples
from conrec.policy.vocabulary import Vocabulary
from conrec.ragged import Ragged


def cells(group: Group) -> list[tuple[Cell, Callable[[Bench], Cell]]]:
    """What is measured of a group's model: the names of each cell, and the work."""
    found: list[tuple[Cell, Callable[[Bench], Cell]]] = []

    def add(measure: Callable[..., Cell], work: str, length: int, *sizes: int, **named: int) -> None:
        cell = {"work": work, "prompt_tokens": length, **named}
        found.append((cell, lambda bench: measure(bench, length, *sizes, *named.values())))

    for length, tokens, groups in group.trained:
        add(Bench.limit, "forward and backward", length, tokens)
        add(Bench.supervised, "supervised step", length, tokens)
        for size in groups:
            add(Bench.grpo, "GRPO step", length, tokens, group=size)
    for length, widths in group.asked:
        for width in widths:
            add(Bench.decoding, "decoding with verdicts", length, width=width)
    length, widths = group.asked[0]
    middle = widths[len(widths) // 2]
    for positions in group.budgets:
        add(Bench.budget, "decoding by positions at a time", length, width=middle, positions=positions)
    if group.profiled:
        add(Bench.kernels, "kernels of decoding", length, width=middle)
    return found


class Enough(Exception):
    """The steps that a cell needs were taken."""


@dataclass
class Bench:
    """A model on the device, with a catalogue, and what can be asked of both.

    `known`: tokens a second of a plain forward and backward, by the length of its rows.
    """

    clock: Clock
    plan: Plan
    group: Group
    trie: Trie
    engine: TorchEngine
    known: dict[int, float] = field(default_factory=dict)

    @classmethod
    def build(cls, clock: Clock, plan: Plan, group: Group, trie: Trie) -> Bench:
        """Random weights, made on the device."""
        torch.manual_seed(0)
        model = random_model(group.shape, DTYPES[group.dtype], clock.device)
        vocabulary = Vocabulary(LEVELS, plan.codes, group.shape.vocabulary - LEVELS * plan.codes, *range(8))
        return cls(clock, plan, group, trie, TorchEngine(model, trie, vocabulary))

    @property
    def model(self) -> Any:
        """The one model that trains and generates."""
        return self.engine.model

    def tokens(self, count: int, length: int) -> Ragged:
        """Rows of random code tokens."""
        first, end = self.engine.vocabulary.first_code_token, self.group.shape.vocabulary
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

            figures = self.clock.seconds(step) | {"tokens": count * length}
            shape = self.group.shape
            flops = 3 * (shape.prompts(count, length) + shape.head(count * LEVELS, shape.vocabulary))
            figures["tokens_per_second"] = count * length / figures["seconds"]
            self.known[length] = figures["tokens_per_second"]
            return self.clock.shares(figures, self.group.dtype, flops)

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
            return self._against_limit(self.clock.shares(figures, self.group.dtype, flops), length)

        return self._fitting(measure, tokens)

    def grpo(self, length: int, tokens: int, group: int) -> Cell:
        """Steps of the loop on prompts of one length, with a reference: sampled, rewarded, one update."""

        def measure(tokens: int) -> Cell:
            count, shape = max(1, tokens // (length + LEVELS * group)), self.group.shape
            random, one = np.random.default_rng(2), np.full(count * 4, 2)
            leaves = [random.integers(0, len(self.trie), count * 8).astype(np.int32) for _ in range(2)]
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
            flops = 3 * (computed + shape.head(count * (1 + group * (LEVELS - 1)), self.plan.codes))
            return self._against_limit(self.clock.shares(figures, self.group.dtype, flops), length)

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
            self.clock.free()

    def _steps(
        self, tasks: dict[str, Examples], stages: dict[str, GrpoSamples], tokens: int, group: int, prompts: int
    ) -> Cell:
        """Seconds between the ends of a loop's steps, the first two left out."""
        none = Ragged.from_lengths(np.zeros(0, np.int32), np.zeros(0, np.int64))
        clock: list[float] = []

        def report(row: dict[str, Any]) -> None:
            clock.append(self.clock.idle())
            if len(clock) > 3 and (clock[-1] - clock[2] > self.plan.cell_seconds or len(clock) == 22):
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
            torch.zeros(len(self.trie), 1),
            torch.from_numpy(self.trie.semantic_ids),
            training_config(self.plan.codes, tokens, group, prompts),
            lambda leaves: {},
            report,
            lambda state: None,
        )
        with contextlib.suppress(Enough):
            loop.run()
        steps = np.diff(clock[2:] if len(clock) > 3 else clock).tolist()
        return {"seconds": median(steps), "repeats": len(steps)}

    # ---- decoding ----

    def users(self, length: int, width: int) -> int:
        """What fits into one batch of the engine, once nothing of a training is left on the device."""
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        self.clock.free()
        return max(1, min(self.plan.users, self.engine.trie.batch_tokens // (length + LEVELS * width)))

    def decoding(self, length: int, width: int) -> Cell:
        """One full batch of the engine, beside the prompts alone and the trie's part of it."""
        shape, size = self.group.shape, DTYPES[self.group.dtype].itemsize
        count = self.users(length, width)
        prompts = self.tokens(count, length)
        alone = self.clock.seconds(lambda: self.prompts_only(prompts))
        figures = self.clock.seconds(lambda: self.engine.generate_and_judge(prompts, width)) | {"users": count}
        figures["users_per_second"] = count / figures["seconds"]
        figures["prompts_only_users_per_second"] = count / alone["seconds"]
        figures["share_of_prompts_only"] = alone["seconds"] / figures["seconds"]
        prefill = shape.prompts(count, length)
        figures["prompts_only_flops_share"] = self.clock.shares(alone, self.group.dtype, prefill)["flops_share"]
        flops = prefill + shape.beams(count, length, width, LEVELS)
        # No decoding can be nearer to prompts only than this, if operations alone counted.
        figures["share_of_prompts_only_by_flops"] = prefill / flops
        moved = (1 + LEVELS) * (shape.matrices * size + shape.cache(count * length, size))
        figures = self.clock.shares(figures, self.group.dtype, flops, moved)
        figures["trie_seconds"] = self.trie_seconds(count, width)
        figures["trie_share"] = figures["trie_seconds"] / figures["seconds"]
        return figures

    def prompts_only(self, prompts: Ragged) -> None:
        """The prompts and their keys and values, as the engine's search begins; nothing is generated."""
        from transformers import DynamicCache

        decoder, _ = decoder_and_head(self.model)
        with torch.no_grad():
            for rows in length_batches(prompts.lengths, 0, self.engine.trie.batch_tokens):
                tokens = torch.as_tensor(prompts.take(rows).padded(0), dtype=torch.int64, device=self.clock.device)
                cache = DynamicCache(config=decoder.config)
                decoder(input_ids=tokens, past_key_values=cache, use_cache=True)

    def trie_seconds(self, count: int, width: int) -> float:
        """What a search asks of the trie, all levels: children, and log-probabilities renormalised over them.

        Softmax included, which a search without a trie needs too: an upper bound.
        """
        trie: DeviceTrie = self.engine.trie
        random, device = torch.Generator().manual_seed(0), self.clock.device
        levels = []
        for level in range(LEVELS):
            shape = (count, min(width, trie.node_counts[level]) if level else 1)
            nodes = torch.randint(trie.node_counts[level], shape, generator=random).to(device)
            levels.append((nodes, torch.randn(*shape, trie.codes, device=device)))

        def ask() -> None:
            for level, (nodes, logits) in enumerate(levels):
                trie.children(level, nodes)
                step_log_probs(logits, nodes, level, trie)

        return float(self.clock.seconds(ask)["seconds"])

    def budget(self, length: int, width: int, positions: int) -> Cell:
        """Users a second with so many positions at a time; users enough for one batch of any of them."""
        count = max(1, max(self.group.budgets) // (length + LEVELS * width))
        prompts = self.tokens(count, length)
        figures = self.clock.seconds(
            lambda: judged_beam_search(self.model, prompts, self.engine.trie, width, positions)
        )
        return figures | {"users": count, "users_per_second": count / figures["seconds"]}

    def kernels(self, length: int, width: int) -> Cell:
        """Where the device's time goes in one full batch, by kernel, and how much of the time it works at all."""
        from torch.profiler import ProfilerActivity, profile

        prompts = self.tokens(self.users(length, width), length)
        self.engine.generate_and_judge(prompts, width)
        cuda = self.clock.device.type == "cuda"
        start = self.clock.idle()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
            self.engine.generate_and_judge(prompts, width)
            seconds = self.clock.idle() - start
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
            # The whole step at once: what does not fit is tried with fewer tokens.
            "train": {"checkpoint_every": 1_000_000, "tokens_at_once": max(tokens, 65_536)},
        }
    )
