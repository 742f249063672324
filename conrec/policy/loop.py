"""The training loop: supervised phases, then the stages of progressive GRPO, resumable at every checkpoint.

    supervised   minimise cross-entropy of translation, alignment, warm-up, one after the other
    grpo stage   roll out G distinct completions per prompt, reward, one update held to the policy at the
                 start of the stage; every few dozen steps measure FHR and FPH on validation anchors;
                 end with the best state seen, or, if chance explains its gain, with the state before (a rejected
                 stage, of which there is none where grpo.tolerance is 1); without validation anchors nothing is
                 measured and the last state stands
    s_dpo        a stage may compare observed rejections with likes instead: another step, the same stage

No stage trains the verdict, and none needs to be kept from harming it: its AUC falls by .001 in 100 steps of GRPO, by
.002 in 100 of S-DPO (docs/experiments.md), and is measured after every phase.

Invariant: all randomness of a step comes from (seed, phase, step, worker), so a run resumed from a checkpoint goes
the way it would have gone. Phases are numbered within their kind, so stages that start from weights on file go the
way of those that follow their supervised phases at once. The loop knows neither Ray nor files; `conrec.policy.workers`
supplies both. A step is one call of an algorithm: `supervised.Supervised`, `grpo.Grpo`, `sdpo.Sdpo`. With more than one
worker every worker holds the whole model and the gradients are summed: sums over examples divided by global counts, so
that the number of workers changes a step by what is rounded and by what attention dropout leaves out, and no more. What
is of the masters, each holds its share of (`conrec.policy.masters`); a checkpoint is whole, for any number of workers.

    TrainingLoop(model, data, DeviceTrie(trie, vocabulary), vectors, codes, config, evaluate, print, checkpoint).run()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as distributed

from conrec.config import Config, GrpoStage
from conrec.errors import ConfigError
from conrec.policy.acceptance import Gain, lift_gain, sure_lift
from conrec.policy.decoding import DeviceTrie, beam_search, given_log_probs, pair_verdicts
from conrec.policy.grpo import Grpo
from conrec.policy.learner import Algorithm, Figures, Learner, Start
from conrec.policy.masters import Masters
from conrec.policy.memory import training_positions
from conrec.policy.model import recompute_layers, trainable
from conrec.policy.optimiser import WEIGHT_DECAY, Optimiser, collected, cosine, part, rising
from conrec.policy.rewards import Rewarder
from conrec.policy.samples import TrainingData
from conrec.policy.sdpo import Sdpo
from conrec.policy.supervised import Supervised, batches
from conrec.policy.tasks import drop_events
from conrec.ragged import Ragged

Evaluate = Callable[[np.ndarray], Mapping[str, np.ndarray | float]]
"""Leaves (A, W) of the validation anchors, best first -> values (A,) of each measure, NaN where undefined, or a number
for all; `fhr` and `fph` among them."""

STAGE_GROUPS = ("reference", "best", "values before", "best values")
TENSOR_GROUPS = (*STAGE_GROUPS, "optimiser", "masters")


@dataclass
class LoopState:
    """Where the run stands; everything but `tensors` is JSON.

    `tensors` holds, by group and name: the trainable tensors at the start (`reference`) and at the best measurement
    (`best`) of the GRPO stage, what validation measured of each anchor at both, what the optimiser keeps, and the
    float32 `masters` of what the model holds less precisely. A group may be empty. Within the loop each worker has its
    share of them, in a checkpoint the first one all.
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
        self.masters = Masters(dict(sorted(trainable(model).items())), self.state.tensors["masters"])
        self.device = self.masters.gradient.device
        numbers, recompute = len(self.masters.gradient), config.train.recompute_layers
        # While what a checkpoint held is not on the device yet: its place there is reserved, as in a run that begins.
        room = config.train.tokens_at_once or training_positions(
            model, trie.levels, numbers, self.masters.world, recompute, data.longest
        )
        self.state.tensors = self._share(self.state.tensors)
        if recompute:
            recompute_layers(model)
        self.learner = Learner(model, trie, self.masters, config.train, room)
        rewarder = Rewarder(vectors.to(self.device), codes.to(self.device), config.grpo.reward, config.grpo.gamma)
        self.algorithms: dict[str, Algorithm] = {
            "grpo": Grpo(self.learner, rewarder, config.grpo),
            "s_dpo": Sdpo(self.learner, config.grpo),
        }
        self.world, self.rank = self.learner.world, self.learner.rank
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
            self._checkpoint()

    # ---- supervised ----

    def _supervised_phase(self, name: str, optimiser: Optimiser) -> None:
        steps, examples = self.supervised[name], self.data.tasks[name]
        peak = self.config.supervised.learning_rate
        self.model.train()
        while self.state.step < len(steps):
            began = time.perf_counter()
            batch = examples.take(steps[self.state.step])
            if name == "warm_up" and self.config.supervised.event_dropout:
                batch = drop_events(batch, self.trie.levels + 1, self.config.supervised.event_dropout, self._random())
            # Dropout inside the model draws from the global generator.
            torch.manual_seed(self._step_seed())
            rate = peak * cosine(self.state.step, len(steps))
            figures = _timed(Supervised(self.learner).step(batch, optimiser, rate), began)
            self._require_finite(name, optimiser, f"supervised.learning_rate = {peak:g}")
            self._row(name, **figures)
            self._step_done(optimiser)
        self._phase_done(name)

    # ---- GRPO ----

    def _grpo_stage(self, stage: GrpoStage, optimiser: Optimiser) -> None:
        state, tensors, samples = self.state, self.state.tensors, self.data.stages[stage.name]
        validated = len(self.data.validation) > 0
        if not tensors["reference"]:
            tensors["reference"] = self.masters.copies()
            tensors["values before"] = self._measure() if validated else {}
        origin = Start(self.masters.whole(tensors["reference"]), stage.beta)
        algorithm = self.algorithms[stage.objective]
        # With dropout, two passes of the same weights would differ: ratios from 1, divergences from 0.
        self.model.eval()
        while state.step < stage.steps:
            began = time.perf_counter()
            rate = self.config.grpo.learning_rate * rising(state.step)
            batch = samples.take(self._rows(len(samples.prompts)))
            figures = _timed(algorithm.step(batch, origin, self._random(), optimiser, rate), began)
            self._require_finite(stage.name, optimiser, f"grpo.learning_rate = {self.config.grpo.learning_rate:g}")
            last = state.step + 1 == stage.steps
            if validated and (last or (state.step + 1) % self.config.grpo.evaluate_every == 0):
                values = self._measure()
                measured = _means(values)
                if self._is_best(values):
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
            accepted = gain is not None and (gain.sure or self._best_stands)
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

    @property
    def _best_stands(self) -> bool:
        """Whether no stage is rejected: a rival is what it was trained to be, not what we began it from."""
        return self.config.grpo.tolerance == 1

    def _is_best(self, values: dict[str, torch.Tensor]) -> bool:
        """Whether this is the best measurement of the stage so far, and one that may be accepted."""
        start, best = (self.state.tensors[group] for group in ("values before", "best values"))
        if self._best_stands:
            # No floor on FHR and no test of the gain stand behind this choice.
            return not best or sure_lift(_on_cpu(values)) > sure_lift(_on_cpu(best))
        measured, least = _means(values), _means(start)["fhr"] * (1 - self.config.grpo.tolerance)
        return measured["fhr"] >= least and _lift(measured) > _lift(_means(best or start))

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
        return lift_gain(_on_cpu(before), _on_cpu(best), self.data.validation_users, readings)

    def _measure(self) -> dict[str, torch.Tensor]:
        """FHR, FPH and what else `evaluate` says, of each validation anchor, equal on every worker."""
        self.model.eval()
        prompts = self.data.validation
        mine = self.learner.mine(len(prompts))
        width, budget = self.config.generate.beam_width, self.learner.tokens_at_once
        leaves, _ = beam_search(self.model, prompts.take(mine), self.trie, width, budget)
        all_leaves = torch.full((len(prompts), leaves.shape[1]), 0, dtype=torch.int64, device=self.device)
        all_leaves[mine] = leaves
        if self.world > 1:
            distributed.all_reduce(all_leaves)
        values = self.evaluate(all_leaves.cpu().numpy())
        return {
            name: torch.as_tensor(value).float().expand(len(prompts)).contiguous() for name, value in values.items()
        }

    def _phase_done(self, phase: str) -> None:
        """A row with what a phase may have cost: how many questions are still answered right, and the verdict's AUC."""
        self.model.eval()
        verdict_auc = self._verdict_auc()
        if self.rank == 0 and (figures := self._forgetting() | verdict_auc):
            self._row(phase, **figures)

    def _forgetting(self) -> dict[str, float]:
        """Share of held-out alignment questions answered right (choice among the listed options)."""
        questions = self.data.questions
        if not len(questions.prompts):
            return {}
        options = questions.options
        choices = given_log_probs(self.model, questions.prompts, options, self.trie, self.learner.tokens_at_once)
        right = choices.argmax(1) == questions.answer
        return {"alignment_accuracy": float(right.mean())}

    def _verdict_auc(self) -> dict[str, float]:
        """How well the verdict tells what validation anchors rejected later from what they liked, equal on every
        worker."""
        prompts, pairs = self.data.validation, self.data.pairs
        if not len(pairs.rejected):
            return {}
        mine, budget = self.learner.mine(len(prompts)), self.learner.tokens_at_once
        verdicts = torch.zeros(len(pairs.rejected), device=self.device)
        judged = pair_verdicts(self.model, prompts.take(mine), pairs.leaves.take(mine), self.trie, budget)
        places = Ragged(np.arange(len(verdicts)), pairs.leaves.offsets).take(mine).values
        verdicts[places] = torch.from_numpy(judged).to(self.device)
        if self.world > 1:
            distributed.all_reduce(verdicts)
        value = pairs.auc(verdicts.cpu().numpy())
        return {} if value is None else {"verdict_auc": value}

    # ---- mechanics ----

    def _optimiser(self, phase: str | GrpoStage) -> Optimiser:
        decay = 0.0 if isinstance(phase, GrpoStage) else WEIGHT_DECAY
        return Optimiser(self.masters, decay, self.state.tensors["optimiser"])

    def _random(self) -> np.random.Generator:
        """Of this step, the same on every worker: their number changes nothing that is drawn of it."""
        return np.random.default_rng([self.config.seed, self._number, self.state.step])

    def _require_finite(self, phase: str, optimiser: Optimiser, setting: str) -> None:
        """Raises `ConfigError` where the last step has made weights of what is no number, before any of it is kept.

        The norm is the same on every worker: all of them stop, and none waits for another.
        """
        if not math.isfinite(optimiser.norm):
            raise ConfigError(
                f"the training has diverged: in step {self.state.step + 1} of {phase} the gradient's norm is "
                f"{optimiser.norm}; lower {setting}"
            )

    def _step_done(self, optimiser: Optimiser) -> None:
        self.state.step += 1
        if self.state.step % self.config.train.checkpoint_every == 0:
            self.state.tensors["optimiser"] = optimiser.kept()
            self._checkpoint()

    def _checkpoint(self) -> None:
        held = self.state.tensors
        groups = {group: self.masters.collected(held[group]) for group in ("reference", "best", "masters")}
        groups["optimiser"] = collected(held["optimiser"], self.masters)
        self.checkpoint(replace(self.state, tensors=held | groups))

    def _share(self, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint held, less what is other workers', where the model is."""
        held = tensors | {group: self.masters.part(tensors[group]) for group in ("reference", "best")}
        held |= {"optimiser": part(tensors["optimiser"], self.masters), "masters": self.masters.rounded()}
        return {group: {name: one.to(self.device) for name, one in named.items()} for group, named in held.items()}

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


def _timed(figures: Figures, began: float) -> Figures:
    """Tokens a second instead of tokens."""
    rest = {name: value for name, value in figures.items() if name != "tokens"}
    return rest | {"tokens_per_second": figures["tokens"] / (time.perf_counter() - began)}


def _means(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.nanmean()) for name, value in values.items()}


def _lift(figures: dict[str, float]) -> float:
    return figures["fhr"] / max(figures["fph"], 1e-9)


def _on_cpu(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.cpu().numpy() for name, value in values.items()}
