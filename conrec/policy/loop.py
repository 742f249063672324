"""The training loop: supervised phases, then the stages of progressive GRPO, resumable at every checkpoint.

    supervised   minimise cross-entropy of translation, alignment, warm-up, one after the other
    grpo stage   roll out G distinct completions per prompt, reward, one or more clipped updates against the
                 policy at the start of the stage; every few dozen steps measure FHR and FPH on validation anchors;
                 end with the best state seen, or, if chance explains its gain, with the state before (a rejected
                 stage); without validation anchors nothing is measured and the last state stands
    s_dpo        a stage may compare observed rejections with likes instead: another step, the same stage

No stage trains the verdict, and none needs to be kept from harming it: its AUC falls by .001 in 100 steps of GRPO, by
.002 in 100 of S-DPO (docs/experiments.md), and is measured after every phase.

Invariant: all randomness of a step comes from (seed, phase, step, worker), so a run resumed from a checkpoint goes
the way it would have gone. Phases are numbered within their kind, so stages that start from weights on file go the
way of those that follow their supervised phases at once. The loop knows neither Ray nor files; `conrec.policy.training`
supplies both, and `conrec.policy.steps` the gradient of a step. With more than one worker every worker holds the whole
model and the gradients are summed: sums over examples divided by global counts, so that the number of workers does not
change a step, but for which attention dropout leaves out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from conrec.config import Config, GrpoStage
from conrec.policy.acceptance import Gain, lift_gain
from conrec.policy.decoding import DeviceTrie, beam_search, given_log_probs, pair_verdicts
from conrec.policy.masters import Masters
from conrec.policy.model import recompute_layers, trainable
from conrec.policy.rewards import Rewarder
from conrec.policy.samples import GrpoSamples, TrainingData
from conrec.policy.sdpo import MOST_COMPARED, draw_comparisons
from conrec.policy.steps import Steps
from conrec.policy.supervised import batches
from conrec.policy.tasks import drop_events

Evaluate = Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray | float]]
"""(leaves (A, W), log-probabilities (A, W)) of the validation anchors -> values (A,) of each, NaN where undefined, or a
number for all; `fhr` and `fph` among them."""


STAGE_GROUPS = ("reference", "best", "values before", "best values")
TENSOR_GROUPS = (*STAGE_GROUPS, "optimiser", "masters")


@dataclass
class LoopState:
    """Where the run stands; everything but `tensors` is JSON.

    `tensors` holds, by group and name: the trainable tensors at the start (`reference`) and at the best measurement
    (`best`) of the GRPO stage, what validation measured of each anchor at both, what the optimiser keeps, and the
    float32 `masters` of what the model holds less precisely. A group may be empty.
    """

    phase: int = 0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=lambda: {name: {} for name in TENSOR_GROUPS})


class TrainingLoop:
    """One worker's view of the run: the phases that `data` has tasks or samples for.

    `checkpoint(state)` is called by every worker at the same steps.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        trie: DeviceTrie,
        vectors: torch.Tensor,
        codes: torch.Tensor,
        config: Config,
        evaluate: Evaluate,
        report: Callable[[dict[str, Any]], None],
        checkpoint: Callable[[LoopState], None],
        state: LoopState | None = None,
    ) -> None:
        self.model, self.data, self.trie, self.config = model, data, trie, config
        self.evaluate, self.report, self.checkpoint = evaluate, report, checkpoint
        self.state = state or LoopState()
        if config.train.recompute_layers:
            recompute_layers(model)
        self.masters = Masters(dict(sorted(trainable(model).items())), self.state.tensors["masters"])
        self.state.tensors["masters"] = self.masters.rounded()
        self.device = self.masters.gradient.device
        self.rewarder = Rewarder(vectors.to(self.device), codes.to(self.device), config.grpo.reward, config.grpo.gamma)
        self.learn = Steps(model, trie, self.rewarder, self.masters, config)
        self.world = distributed.get_world_size() if distributed.is_initialized() else 1
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.supervised = {
            name: batches(data.tasks[name], config.supervised.tokens_per_step, epochs, config.seed)
            for name, epochs in epochs_of(config).items()
            if name in data.tasks
        }
        stages = [stage for stage in config.grpo.stages if stage.name in data.stages]
        self.phases: list[str | GrpoStage] = [*self.supervised, *stages]

    def steps(self) -> list[tuple[str, int]]:
        """(name, steps) of every phase."""
        return [
            (phase.name, phase.steps) if isinstance(phase, GrpoStage) else (phase, len(self.supervised[phase]))
            for phase in self.phases
        ]

    def run(self) -> None:
        """Runs what is left of all phases."""
        while self.state.phase < len(self.phases):
            phase = self.phases[self.state.phase]
            optimiser = self._optimiser(phase)
            if isinstance(phase, GrpoStage):
                self._grpo_stage(phase, optimiser)
            else:
                self._supervised_phase(phase, optimiser)
            self.state.phase, self.state.step, self.state.tensors["optimiser"] = self.state.phase + 1, 0, {}
            self.checkpoint(self.state)

    # ---- supervised ----

    def _supervised_phase(self, name: str, optimiser: torch.optim.Optimizer) -> None:
        steps, examples = self.supervised[name], self.data.tasks[name]
        peak = self.config.supervised.learning_rate
        self.model.train()
        while self.state.step < len(steps):
            began = time.perf_counter()
            _set_learning_rate(optimiser, peak * schedule(self.state.step, len(steps)))
            batch = examples.take(steps[self.state.step])
            if name == "warm_up" and self.config.supervised.event_dropout:
                # Dropped for the whole step by every worker: their number does not change what is left.
                random = np.random.default_rng([self.config.seed, self._number, self.state.step])
                batch = drop_events(batch, self.trie.levels + 1, self.config.supervised.event_dropout, random)
            batch = batch.take(np.arange(self.rank, len(batch.tokens), self.world))
            # Dropout inside the model draws from the global generator.
            torch.manual_seed(self._step_seed())
            self.masters.clear()
            sums = self._reduced(**self.learn.supervised(batch), tokens=len(batch.tokens.values))
            count = max(sums["targets"], 1)
            self.masters.apply(optimiser, 1 / count)
            rate = sums["tokens"] / (time.perf_counter() - began)
            self._row(name, loss=sums["loss"] / count, tokens_per_second=rate)
            self._step_done(optimiser)
        self._phase_done(name)

    # ---- GRPO ----

    def _grpo_stage(self, stage: GrpoStage, optimiser: torch.optim.Optimizer) -> None:
        state, tensors, samples = self.state, self.state.tensors, self.data.stages[stage.name]
        validated = len(self.data.validation) > 0
        if not tensors["reference"]:
            tensors["reference"] = self.masters.copies()
            tensors["values before"] = self._measure() if validated else {}
        step = self._sdpo_step if stage.objective == "s_dpo" else self._grpo_step
        # With dropout, two passes of the same weights would differ: ratios from 1, divergences from 0.
        self.model.eval()
        while state.step < stage.steps:
            began = time.perf_counter()
            _set_learning_rate(optimiser, self.config.grpo.learning_rate * min(1.0, (state.step + 1) / 10))
            figures = step(stage, samples, optimiser)
            if self.rank == 0:
                figures["tokens_per_second"] = figures.pop("tokens") / (time.perf_counter() - began)
            last = state.step + 1 == stage.steps
            if validated and (last or (state.step + 1) % self.config.grpo.evaluate_every == 0):
                values = self._measure()
                measured, start = _means(values), _means(tensors["values before"])
                best = _means(tensors["best values"]) or start
                if _admissible(measured, start, self.config.grpo.tolerance) and _lift(measured) > _lift(best):
                    tensors["best"], tensors["best values"], state.best_step = (
                        self.masters.copies(),
                        values,
                        state.step + 1,
                    )
                figures |= {f"validation_{name}": value for name, value in measured.items()}
            self._row(stage.name, **figures)
            self._step_done(optimiser)
        if validated:
            gain = self._gain(stage)
            accepted = gain is not None and gain.sure
            self.masters.restore(tensors["best" if accepted else "reference"])
            start = _means(tensors["values before"])
            best = _means(tensors["best values"]) or start
            self._row(
                stage.name,
                stage_accepted=accepted,
                best_step=state.best_step,
                **{f"before_{name}": value for name, value in start.items()},
                **{f"after_{name}": value for name, value in best.items()},
                **({} if gain is None else {"lift_ratio": gain.ratio, "lift_chance": gain.chance}),
            )
        state.best_step = 0
        tensors |= {group: {} for group in STAGE_GROUPS}
        self._phase_done(stage.name)

    def _grpo_step(self, stage: GrpoStage, samples: GrpoSamples, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        settings = self.config.grpo
        mine = slice(self.rank, None, self.world)
        # Drawn for the whole step by every worker: which completions a prompt gets does not tell their number.
        random = np.random.default_rng([self.config.seed, self._number, self.state.step])
        seeds = random.integers(1 << 62, size=settings.prompts_per_step)[mine]
        self.masters.clear()
        batch = samples.take(self._rows(len(samples.prompts))[mine])
        rollouts, figures = self.learn.grpo(batch, seeds, self.state.tensors["reference"], stage.beta)
        sums = self._reduced(**figures)
        total = max(sums["counts"], 1)
        self.masters.apply(optimiser, 1 / total)
        for _ in range(1, settings.updates_per_rollout):
            self.masters.clear()
            sums |= self._reduced(**self.learn.grpo_again(rollouts, stage.beta))
            self.masters.apply(optimiser, 1 / total)
        leaves = torch.cat([rollout.leaves.flatten() for rollout in rollouts])
        generated = torch.bincount(leaves[leaves >= 0], minlength=len(self.rewarder.codes))
        if self.world > 1:
            distributed.all_reduce(generated)
        means = ("reward", "reward_gain", "reward_penalty", "entropy")
        return {
            "loss": sums["loss"] / total,
            "kl": sums["kl"] / total,
            **{name: sums[name] / max(sums["completions"], 1) for name in means},
            "groups_without_variance": sums["flat"] / sums["groups"],
            # Share of the groups that hold it: a reward farmed by one hub shows here first.
            "most_frequent_share": float(generated.max()) / sums["groups"],
            "tokens": sums["tokens"],
        }

    def _sdpo_step(self, stage: GrpoStage, samples: GrpoSamples, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
        batch = samples.take(self._rows(len(samples.prompts)))
        random = np.random.default_rng([self.config.seed, self._number, self.state.step])
        # Drawn for the whole step by every worker: the likes lent between samples know no workers.
        compared = draw_comparisons(batch, min(self.config.grpo.group_size - 1, MOST_COMPARED), random)
        mine = np.arange(self.rank, len(compared), self.world)
        leaves = torch.from_numpy(compared[mine]).to(self.device)
        self.masters.clear()
        sums = self._reduced(
            **self.learn.sdpo(batch.prompts.take(mine), leaves, self.state.tensors["reference"], stage.beta),
            samples=len(mine),
        )
        count = max(sums["counts"], 1)
        self.masters.apply(optimiser, 1 / count)
        return {
            "loss": sums["loss"] / count,
            "margin": sums["margins"] / count,
            "samples_without_comparison": 1 - sums["counts"] / sums["samples"],
            "tokens": sums["tokens"],
        }

    def _rows(self, count: int) -> np.ndarray:
        """The samples of this step: all are seen once before any is seen again."""
        size = self.config.grpo.prompts_per_step
        positions = self.state.step * size + np.arange(size)
        passes = positions // count
        orders = {
            number: np.random.default_rng([self.config.seed, self._number, number]).permutation(count)
            for number in np.unique(passes).tolist()
        }
        return np.array([orders[number][place] for number, place in zip(passes, positions % count, strict=True)])

    # ---- measuring ----

    def _gain(self, stage: GrpoStage) -> Gain | None:
        """What the best measurement gained over the start; None where none was better."""
        before, best = self.state.tensors["values before"], self.state.tensors["best values"]
        if not best:
            return None
        readings = -(-stage.steps // self.config.grpo.evaluate_every)
        was, is_ = ({name: values.cpu().numpy() for name, values in one.items()} for one in (before, best))
        return lift_gain(was, is_, self.data.validation_users, readings)

    def _measure(self) -> dict[str, torch.Tensor]:
        """FHR, FPH and what else `evaluate` says, of each validation anchor, equal on every worker."""
        self.model.eval()
        prompts = self.data.validation
        mine = np.arange(self.rank, len(prompts), self.world)
        width, budget = self.config.generate.beam_width, self.config.train.tokens_at_once
        leaves, log_probs = beam_search(self.model, prompts.take(mine), self.trie, width, budget)
        all_leaves = torch.full((len(prompts), leaves.shape[1]), 0, dtype=torch.int64, device=self.device)
        all_log_probs = torch.zeros(all_leaves.shape, device=self.device)
        all_leaves[mine], all_log_probs[mine] = leaves, log_probs
        if self.world > 1:
            distributed.all_reduce(all_leaves)
            distributed.all_reduce(all_log_probs)
        values = self.evaluate(all_leaves.cpu().numpy(), all_log_probs.cpu().numpy())
        return {
            name: torch.as_tensor(value).float().expand(len(prompts)).contiguous() for name, value in values.items()
        }

    def _phase_done(self, phase: str) -> None:
        """A row with what a phase may have cost: how many questions are still answered right, and the verdict's AUC."""
        self.model.eval()
        if self.rank == 0 and (figures := self._forgetting() | self._verdict_auc()):
            self._row(phase, **figures)

    def _forgetting(self) -> dict[str, float]:
        """Share of held-out alignment questions answered right (choice among the listed options)."""
        questions = self.data.questions
        if not len(questions.prompts):
            return {}
        options = questions.options
        choices = given_log_probs(self.model, questions.prompts, options, self.trie, self.config.train.tokens_at_once)
        right = choices.argmax(1) == questions.answer
        return {"alignment_accuracy": float(right.mean())}

    def _verdict_auc(self) -> dict[str, float]:
        """How well the verdict tells what validation anchors rejected later from what they liked."""
        prompts, pairs = self.data.validation, self.data.pairs
        if not len(prompts):
            return {}
        budget = self.config.train.tokens_at_once
        value = pairs.auc(pair_verdicts(self.model, prompts, pairs.leaves, self.trie, budget))
        return {} if value is None else {"verdict_auc": value}

    # ---- mechanics ----

    def _optimiser(self, phase: str | GrpoStage) -> torch.optim.Optimizer:
        decay = 0.0 if isinstance(phase, GrpoStage) else self.config.supervised.weight_decay
        return self.masters.optimiser(decay, self.state.tensors["optimiser"])

    def _reduced(self, **values: torch.Tensor | float) -> dict[str, float]:
        """Sums over the workers."""
        # float32: some accelerators have nothing wider, and these are figures to look at.
        sums = torch.tensor([float(value) for value in values.values()], device=self.device)
        if self.world > 1:
            distributed.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def _step_done(self, optimiser: torch.optim.Optimizer) -> None:
        self.state.step += 1
        if self.state.step % self.config.train.checkpoint_every == 0:
            self.state.tensors["optimiser"] = self.masters.kept_of(optimiser)
            self.checkpoint(self.state)

    def _row(self, phase: str, **figures: Any) -> None:
        row = {"phase": phase, "step": self.state.step + 1, **figures}
        self.state.rows.append(row)
        if self.rank == 0:
            self.report(row)

    def _step_seed(self) -> int:
        return hash((self.config.seed, self._number, self.state.step, self.rank)) & 0x7FFFFFFF

    @property
    def _number(self) -> int:
        """Of the phase, among the supervised ones or among the stages."""
        phase = self.state.phase
        return phase - len(self.supervised) if phase >= len(self.supervised) else phase


def epochs_of(config: Config) -> dict[str, float]:
    """Passes over each supervised task, in order; tasks with none are left out."""
    supervised = config.supervised
    epochs = {
        "translation": supervised.translation_epochs,
        "alignment": supervised.alignment_epochs,
        "warm_up" if supervised.warmup_target == "events" else "next_negative": supervised.warmup_epochs,
    }
    return {name: passes for name, passes in epochs.items() if passes > 0}


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first 5 %, then a cosine to a tenth."""
    warm = max(1, round(0.05 * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + float(np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def _set_learning_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = value


def _means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.nanmean()) for name, value in values.items()}


def _lift(figures: dict[str, float]) -> float:
    return figures["fhr"] / max(figures["fph"], 1e-9)


def _admissible(figures: dict[str, float], start: dict[str, float], tolerance: float) -> bool:
    return figures["fhr"] >= start["fhr"] * (1 - tolerance)
