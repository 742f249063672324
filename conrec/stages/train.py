"""Train stage: history and catalogue -> the policy: checkpoints, adapter, metrics, plots."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conrec import storage
from conrec.artefact import UNFINISHED, Artefact
from conrec.config import Config, TimelineSettings
from conrec.evaluation.leaks import check_training_anchors
from conrec.evaluation.validation import ValidationMeasure
from conrec.policy.curriculum import TrainingWorld, grpo_stages, supervised_tasks
from conrec.policy.loop import epochs_of
from conrec.policy.model import put_tensors, read_tensors, save_checkpoint, write_tensors
from conrec.policy.samples import TrainingData
from conrec.policy.supervised import batches
from conrec.policy.tasks import Examples
from conrec.progress import console, progress
from conrec.spent import spent
from conrec.stages.artefacts import Artefacts
from conrec.stages.catalogue import make_catalogue
from conrec.stages.inputs import read_events
from conrec.stages.new_items import load_catalogue

if TYPE_CHECKING:
    # Ray Train and matplotlib are loaded where something is trained: every night imports this module.
    from conrec.policy.workers import Inputs

STAGES_CLOCK = ".grpo.json"
"""Beside the clock of a whole training: how long of it the stages took."""


def make_policy(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves checkpoint/ (what vLLM loads), supervised/ (the policy before GRPO), adapter/ with LoRA, metrics.jsonl,
    plots.

    Trained twice: first on what lies before the validation time, where the days until the cut decide which stages of
    GRPO are accepted, and after how many steps; then the same again on everything until the cut, since the newest
    events tell the most about what comes next. Without stages there is nothing to decide; the first training then waits
    until a score is fitted. With `timeline.refit` false the first training is the policy.
    """
    from conrec.report.training_plots import plot_training

    config = run.config
    if not config.timeline.refit:
        return _served_as_validated(run, artefact)
    decided = validated(run) if config.grpo.stages else Validated([], [], 0.0)
    accepted = {row["phase"]: row["best_step"] for row in decided.stages if row["stage_accepted"]}
    stages = tuple(
        stage.model_copy(update={"steps": accepted[stage.name]})
        for stage in config.grpo.stages
        if stage.name in accepted
    )
    chosen = config.model_copy(update={"grpo": config.grpo.model_copy(update={"stages": stages})})
    world, trained, figures = train_both(run.of(chosen), artefact)
    figures["training_seconds"]["validated"] = decided.seconds
    save_policy(world.model, world.tokenizer, trained, artefact, config)
    write_rows(trained.rows, artefact)
    plot_training(decided.rows or trained.rows, artefact.path("training.png"))
    # The refit has seen what the verdict would be tried on: its twin's figures stand for it.
    return figures | {"stages": decided.stages, "verdict_auc": verdict_aucs(decided.rows)}


def _served_as_validated(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves what `make_policy` does, of the training until the validation time."""
    from conrec.report.training_plots import plot_training

    decided, first = validated(run), run["validated"]
    for name in ("supervised", "checkpoint", *(["adapter"] if run.config.lora is not None else [])):
        with storage.local_folder(first.path(name)) as folder:
            storage.upload(folder, artefact.path(name))
    write_rows(decided.rows, artefact)
    plot_training(decided.rows, artefact.path("training.png"))
    return dict(first.require()["figures"])


@dataclass(frozen=True)
class Validated:
    """What the training until the validation time found: its metrics, and what it decided over the stages."""

    rows: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    seconds: float


def validated(run: Artefacts) -> Validated:
    """Trains on what lies before the validation time, for every user, or reads what another run found.

    Leaves checkpoint/, supervised/, adapter/ with LoRA and metrics.jsonl in an artefact of its own.
    """
    artefact = run["validated"]
    if artefact.read() is not None:
        artefact.tidy()
    else:
        with spent(artefact.url, ".spent.json") as seconds:
            make_earlier_catalogue(run)
            world, trained, figures = train_both(run.earlier, artefact, run.config.timeline)
            save_policy(world.model, world.tokenizer, trained, artefact, run.config)
            write_rows(trained.rows, artefact)
            figures["stages"] = [row for row in trained.rows if "stage_accepted" in row]
            artefact.finish(figures, seconds())
        for row in figures["stages"]:
            verdict = "accepted" if row["stage_accepted"] else "rejected, its weights are dropped"
            if "lift_ratio" in row:
                verdict += f": Lift {row['lift_ratio']:.2f} times, by chance in {row['lift_chance']:.1%} of cases"
            else:
                verdict += ": validation did not improve"
            console.print(
                f"  GRPO stage {row['phase']}: {verdict}; validation FHR {row['before_fhr']:.3f} -> "
                f"{row['after_fhr']:.3f}, FPH {row['before_fph']:.3f} -> {row['after_fph']:.3f}"
            )
    figures = artefact.require()["figures"]
    seconds = sum(figures["training_seconds"].values())
    return Validated(read_rows(artefact), figures["stages"], seconds)


def make_earlier_catalogue(run: Artefacts) -> None:
    """Fits the catalogue of the validation time, unless one is finished."""
    began, artefact = time.perf_counter(), run.earlier["catalogue"]
    if artefact.read() is None:
        artefact.finish(make_catalogue(run.earlier, artefact), time.perf_counter() - began)


@dataclass(frozen=True)
class Trained:
    """Rows of metrics, and the trained tensors before and after GRPO."""

    rows: list[dict[str, Any]]
    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]


def train_both(
    run: Artefacts, artefact: Artefact, decided_by: TimelineSettings | None = None
) -> tuple[TrainingWorld, Trained, dict[str, Any]]:
    """The supervised phases, unless a run with other GRPO settings left them, then the stages of GRPO.

    `decided_by`: the timeline whose validation anchors decide over the stages; they lie at the cut of `run`.
    """
    start = run["supervised"]
    world = training_world(run, decided_by)
    # Before the supervised phases: a stage without samples is told at once.
    stages, figures = grpo_stages(run.config, world)
    tasks = {} if start.read() else supervised_tasks(run.config, world)
    url = storage.absolute(start.path("policy.safetensors"))
    trained = Phases([], {}, 0.0, 0.0)
    if tasks or stages:
        trained = run_phases(run, artefact, world, world.data(tasks, stages), url)
    if tasks:
        rows = [row for row in trained.rows if row["phase"] in tasks]
        start.finish(left_supervised(start, tasks, rows), trained.supervised_seconds)
    initial = read_tensors(url)
    rows = read_rows(start) + [row for row in trained.rows if row["phase"] in stages]
    figures |= {
        "alignment_accuracy": forgetting(rows),
        "verdict_auc": verdict_aucs(rows),
        "parameters": sum(parameter.numel() for parameter in world.model.parameters()),
        "training_seconds": {
            "supervised": start.require()["seconds"],
            "grpo": round(trained.grpo_seconds, 1),
        },
    }
    return world, Trained(rows, initial, trained.final or initial), figures


def left_supervised(artefact: Artefact, tasks: dict[str, Examples], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Leaves metrics.jsonl beside policy.safetensors, the tensors that GRPO starts from; returns the figures."""
    write_rows(rows, artefact)
    tokens = {name: len(examples.tokens.values) for name, examples in tasks.items()}
    return {"supervised_tokens": tokens, "alignment_accuracy": forgetting(rows), "verdict_auc": verdict_aucs(rows)}


def training_world(run: Artefacts, decided_by: TimelineSettings | None = None) -> TrainingWorld:
    """Reads the catalogue and the interactions until the cut, and builds the model.

    Where validation anchors decide, items that come after them are not known, as their events to nobody.
    """
    config = run.config
    catalogue = load_catalogue(run)
    if decided_by is None:
        events = read_events(config, catalogue.item_ids, config.timeline.cut_us)
    else:
        events = read_events(config, catalogue.item_ids, decided_by.cut_us, max_unknown_share=1.0)
    world = TrainingWorld.of(config, catalogue, events, decided_by)
    check_training_anchors(world.history, world.anchors, config.timeline.cut_us)
    return world


@dataclass(frozen=True)
class Phases:
    """Rows of metrics of what was trained, the trained tensors at its end, and the seconds of both kinds of phases over
    all runs."""

    rows: list[dict[str, Any]]
    final: dict[str, torch.Tensor]
    supervised_seconds: float
    grpo_seconds: float

    def save(self, url: str) -> None:
        """Leaves final.safetensors and, last, phases.json."""
        write_tensors(self.final, storage.join(url, "final.safetensors"))
        figures = {name: value for name, value in vars(self).items() if name != "final"}
        # Not `write_json`: a measure may be NaN.
        storage.write_bytes(storage.join(url, "phases.json"), json.dumps(figures).encode())

    @classmethod
    def load(cls, url: str) -> Phases | None:
        """What `save` left; None where it did not come to its end."""
        if not storage.exists(storage.join(url, "phases.json")):
            return None
        figures = storage.read_json(storage.join(url, "phases.json"))
        return cls(final=read_tensors(storage.join(url, "final.safetensors")), **figures)


def run_phases(run: Artefacts, artefact: Artefact, world: TrainingWorld, data: TrainingData, start_url: str) -> Phases:
    """Trains what `data` holds in one run of Ray Train, or reads what came of it. `start_url`: see `Inputs`.

    What comes of it is kept until the artefact is complete: whatever fails behind hours of training, the next run goes
    on from there, also where the supervised phases are an artefact of their own by then. What was left of other stages
    is removed: the first training, made anew, may accept others, or other steps of them.
    """
    from conrec.policy.workers import Inputs

    config, left = run.config, artefact.path(UNFINISHED, "phases")
    stages = {stage.name: stage.steps for stage in config.grpo.stages if stage.name in data.stages}
    begun = artefact.path(UNFINISHED, "stages.json")
    if not storage.exists(begun) or storage.read_json(begun) != stages:
        storage.remove(artefact.path(UNFINISHED))
        storage.write_json(begun, stages)
    before = Phases.load(left)
    trained = set() if before is None else {row["phase"] for row in before.rows}
    if before is not None and {*data.tasks, *data.stages} <= trained and storage.exists(start_url):
        return before
    inputs_url = artefact.path(UNFINISHED, "inputs")
    data.save(inputs_url)
    # Workers start in folders of their own.
    codebook_url = storage.absolute(run["catalogue"].path("codebook.safetensors"))
    inputs = Inputs(
        config,
        # The words of a tokenizer of our own; a pretrained model brings one.
        [] if config.model.name_or_path else world.catalogue.items["text"].to_pylist(),
        world.catalogue.trie,
        codebook_url,
        storage.absolute(inputs_url),
        start_url,
    )
    # What is resumed has the same phases: another run may have left the supervised ones in the meantime.
    url = artefact.path(UNFINISHED, "ray" if data.tasks else "ray-grpo")
    phases = fit_with_progress(config, inputs, ValidationMeasure.of(world), data, url)
    phases.save(left)
    return phases


def write_rows(rows: list[dict[str, Any]], artefact: Artefact) -> None:
    """Leaves metrics.jsonl."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(artefact.path("metrics.jsonl"), lines.encode())


def read_rows(artefact: Artefact) -> list[dict[str, Any]]:
    """Reads metrics.jsonl."""
    return [json.loads(line) for line in storage.read_bytes(artefact.path("metrics.jsonl")).splitlines()]


def forgetting(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy on the held-out alignment questions after each phase that measured it."""
    return {row["phase"]: row["alignment_accuracy"] for row in rows if "alignment_accuracy" in row}


def verdict_aucs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """AUC of the verdict on the validation anchors' pairs after each phase that measured it."""
    return {row["phase"]: row["verdict_auc"] for row in rows if "verdict_auc" in row}


def fit_with_progress(
    config: Config, inputs: Inputs, measure: ValidationMeasure, data: TrainingData, url: str
) -> Phases:
    """`fit` with one bar over all steps. Beside what Ray Train keeps under `url` lies how long it took in all, and how
    long of that the stages: a run that goes on sees no row of the phases that are done."""
    from conrec.policy.workers import fit

    steps = {
        name: len(batches(data.tasks[name], config.supervised.tokens_per_step, passes, config.seed))
        for name, passes in epochs_of(config).items()
        if name in data.tasks
    }
    steps |= {stage.name: stage.steps for stage in config.grpo.stages if stage.name in data.stages}
    # By its place, since a training goes on where it was, and a lost worker's steps come again.
    before = dict(zip(steps, accumulate(steps.values(), initial=0), strict=False))
    grpo: Callable[[], float] | None = None
    with (
        spent(url, ".spent.json") as total,
        ExitStack() as running,
        progress("  training" if data.tasks else "  GRPO", sum(steps.values())) as bar,
    ):

        def stages_begin() -> None:
            nonlocal grpo
            grpo = grpo or running.enter_context(spent(url, STAGES_CLOCK))

        def show(row: dict[str, Any]) -> None:
            if row["phase"] in data.stages:
                stages_begin()
            if "loss" in row:
                reward = f", reward {row['reward']:.4f}" if "reward" in row else ""
                place = before[row["phase"]] + row["step"]
                bar.advance(place - bar.done, note=f"{row['phase']}: loss {row['loss']:.3f}{reward}")

        # The tensors alone are no sign: another policy's training may have left them.
        begun = storage.exists(storage.join(url, STAGES_CLOCK)) and storage.exists(inputs.start_url)
        if begun or not data.tasks:
            stages_begin()
        trained = fit(inputs, measure, url, show)
        # Where nothing was left to train, no row came.
        bar.advance(sum(steps.values()) - bar.done)
        seconds, of_stages = total(), grpo() if grpo is not None else 0.0
    # Each was saved at its own times before a kill: seconds apart.
    return Phases(trained.rows, trained.final, max(0.0, seconds - of_stages), of_stages)


def save_policy(
    model: Any,
    tokenizer: Any,
    trained: Trained,
    artefact: Artefact,
    config: Config,
) -> None:
    """Writes the policy before GRPO and the final one as plain checkpoints; leaves the final weights in `model`."""
    for name, tensors in (("supervised", trained.initial), ("checkpoint", trained.final)):
        put_tensors(model, tensors)
        upload_folder(lambda folder: save_checkpoint(model, tokenizer, folder), artefact.path(name))
    if config.lora is not None:
        upload_folder(lambda folder: model.save_pretrained(folder, safe_serialization=True), artefact.path("adapter"))


def upload_folder(write: Callable[[Path], None], url: str) -> None:
    """Writes files to a local folder, then moves them to any store."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        storage.upload(folder, url)
