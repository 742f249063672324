"""The systems of an evaluation as artefacts, so that a table of hours resumes where it was killed.

    for system in systems(run):
        rows = system.rows(world)        # predicts, or reads what an earlier run left

Floors and sequential models score all items; generative systems rank semantic IDs, which become items as in the night.
Policies that differ from the full method do so by settings alone (`conrec.evaluation.systems`).
Invariant: every system is fitted on events until the cut, predicts the same anchors, under the same exclusions, and
scores the same candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.engines import TorchEngine
from conrec.evaluation.baselines import fit_floors
from conrec.evaluation.document import Group
from conrec.evaluation.policies import answer_of
from conrec.evaluation.rows import LIST, Generated, Row, kept, kept_rows
from conrec.evaluation.seq_rules import RULE_TRIALS, SEQ_RULES, tune_rules
from conrec.evaluation.sequential import KINDS, TRIALS, tune_sequential
from conrec.evaluation.systems import AFTER, BEFORE, NAMES, ablations, rivals
from conrec.evaluation.tiger import TIGER_TRIALS, tune_tiger
from conrec.evaluation.tuning import Tuned
from conrec.evaluation.two_tower import TWO_TOWER_TRIALS, Trunk, TwoTower, tune_two_tower
from conrec.evaluation.world import World
from conrec.feedback.swing import swing_neighbours
from conrec.progress import progress
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import read_events
from conrec.stages.new_items import known_items, load_catalogue
from conrec.stages.train import make_policy, validated


def load_world(run: Artefacts, encoded: bool = True) -> World:
    """Reads catalogue and interactions; unless `encoded`, the items without semantic IDs. Errors of `World.of`."""
    config, end_us = run.config, run.windows_end_us()
    # Where no window is whole, all of the log is read to say so.
    read_us = end_us if end_us > config.timeline.cut_us else run.sources.log.last_us
    items = load_catalogue(run, read_us) if encoded else known_items(run, read_us)
    return World.of(config, items, read_events(config, items.item_ids, read_us), end_us)


@dataclass(frozen=True)
class SystemSpec:
    """A row to be, or the floors, which share an artefact: its id, its group in the table, and how it is made."""

    id: str
    group: Group
    artefact: Artefact
    make: Callable[[World], dict[str, Row]] = field(repr=False)
    """Its row by its id, or rows by theirs."""
    about: Callable[[], dict[str, Any]] | None = field(default=None, repr=False)
    """Of a policy, what its row says beside the answers, by field of `Row`: one whose stages changed nothing shares its
    answers with what they began from, and neither its cost nor its note."""

    @property
    def name(self) -> str:
        """What people read."""
        return NAMES.get(self.id, self.id)

    def rows(self, world: World) -> dict[str, Row]:
        """The finished rows by their ids, read or made."""
        url, manifest = self.artefact.path("predictions.parquet"), self.artefact.read()
        if manifest is None:
            began = time.perf_counter()
            table, figures = kept(self.make(world), self.id)
            storage.write_table(table, url)
            manifest = self.artefact.finish(figures, time.perf_counter() - began)
        rows = kept_rows(storage.read_table(url), manifest["figures"], self.id)
        return rows if self.about is None else {id: replace(row, **self.about()) for id, row in rows.items()}


def systems(run: Artefacts) -> list[SystemSpec]:
    """The rows that the settings ask for, in the order of the table."""
    config = run.config
    floors = SystemSpec("floors", "floor", _plan(run, "floors", {}), _floors)
    if config.evaluation.systems == "floors":
        return [floors]
    ours = [
        _policy(run, BEFORE, "ours", run, "supervised"),
        _policy(run, AFTER, "ours", run, "checkpoint", _unchanged(run["policy"].read())),
    ]
    if config.evaluation.systems == "ours":
        return [floors, *ours]
    sequential = [
        SystemSpec(
            kind, "sequential", _plan(run, kind, {"trials": list(map(asdict, TRIALS))}), partial(_sequential, kind)
        )
        for kind in KINDS
    ]
    rules_plan = _plan(run, SEQ_RULES, {"trials": list(map(asdict, RULE_TRIALS))})
    sequential.append(SystemSpec(SEQ_RULES, "sequential", rules_plan, _rules))
    tiger_plan = _plan(run, "TIGER", {"trials": list(map(asdict, TIGER_TRIALS)), "tuned_on": LIST})
    generative = [
        _policy(run, other.id, "generative", run.of(other.settings), "checkpoint") for other in rivals(config)
    ]
    towers_plan = _plan(
        run,
        "two-tower head",
        {"trials": list(map(asdict, TWO_TOWER_TRIALS)), "tuned_on": LIST},
        {"policy": run["policy"].version, "validated": run["validated"].version},
    )
    generative.insert(0, SystemSpec("two_tower", "generative", towers_plan, partial(_two_tower, run)))
    ablation = [_policy(run, step.id, "ablation", run.of(step.settings), "checkpoint") for step in ablations(config)]
    return [floors, *sequential, SystemSpec("tiger", "generative", tiger_plan, _tiger), *generative, *ablation, *ours]


def _plan(run: Artefacts, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Artefact:
    return run.system(name, {"list": LIST, **settings}, inputs or {})


def _policy(
    run: Artefacts, id: str, group: Group, other: Artefacts, folder: str, unchanged: bool = False
) -> SystemSpec:
    trained = other["policy"]
    asked = "supervised" if unchanged else folder
    artefact = _plan(run, "policy", {"folder": asked}, {"policy": trained.version})

    def about() -> dict[str, Any]:
        figures = trained.require()["figures"]
        seconds = figures["training_seconds"]
        if folder == "checkpoint":
            return {"training_seconds": float(sum(seconds.values())), "note": stages_note(figures["stages"])}
        return {"training_seconds": float(seconds["supervised"])}

    return SystemSpec(id, group, artefact, partial(_predict, id, other, asked), about)


def stages_note(stages: Sequence[Mapping[str, Any]]) -> str | None:
    """What a reader must know of a policy some of whose stages of GRPO were rejected; `stages`: what was decided."""
    rejected = [row["phase"] for row in stages if not row["stage_accepted"]]
    if not rejected:
        return None
    if len(rejected) == len(stages):
        return f"no stage was kept: this is the policy {NAMES[BEFORE]}"
    return f"not kept of its stages: {', '.join(rejected)}"


def _unchanged(manifest: dict[str, Any] | None) -> bool:
    """Whether no stage of GRPO changed a policy: it need not be asked twice."""
    if manifest is None:
        return False
    ends: list[dict[str, str]] = []
    for folder in ("supervised/", "checkpoint/"):
        files = {name: entry for name, entry in manifest["files"].items() if name.startswith(folder)}
        ends.append({name.removeprefix(folder): entry["sha256"] for name, entry in files.items()})
    return bool(ends[0]) and ends[0] == ends[1]


# ---- how each is made ----


def _floors(world: World) -> dict[str, Row]:
    config, item_count = world.config, len(world.items.items)
    neighbours = swing_neighbours(world.past, item_count, config.swing, config.seed)
    rows: dict[str, Row] = {}
    with progress("  floors") as bar:
        began = time.perf_counter()
        for floor in fit_floors(
            world.events, config.timeline.cut_us, item_count, world.items.categories, neighbours, config.seed
        ):
            fitting = time.perf_counter() - began
            rows[floor.name] = replace(world.by_scores(floor.scores), training_seconds=fitting)
            bar.advance(note=floor.name)
            began = time.perf_counter()
    return rows


def _sequential(kind: str, world: World) -> dict[str, Row]:
    config = world.config
    with progress(f"  {kind}") as bar:
        tuned = tune_sequential(
            kind,
            world.events,
            config.timeline,
            len(world.catalogue.semantic_ids),
            TRIALS,
            config.seed,
            lambda line: bar.advance(note=line),
        )
    costs = (tuned.training_seconds, tuned.model.parameters)
    row = world.by_scores(tuned.model.scores)
    return {kind: Row(row.answer, *costs, row.users_per_second, tuned.trials)}


def _rules(world: World) -> dict[str, Row]:
    config = world.config
    with progress(f"  {SEQ_RULES}"):
        tuned = tune_rules(world.events, config.timeline, len(world.items.items), RULE_TRIALS)
    row = world.by_scores(tuned.model.scores)
    return {SEQ_RULES: Row(row.answer, tuned.training_seconds, None, row.users_per_second, tuned.trials)}


def _tiger(world: World) -> dict[str, Row]:
    config, catalogue = world.config, world.catalogue
    with progress("  TIGER") as bar:
        tuned = tune_tiger(
            world.events,
            config.timeline,
            catalogue.semantic_ids,
            catalogue.trie,
            TIGER_TRIALS,
            config.seed,
            note=lambda line: bar.advance(note=line),
        )
    began = time.perf_counter()
    leaves, log_probs = tuned.model.generate(world.histories, LIST)
    speed = len(leaves) / (time.perf_counter() - began)
    answer = Generated(leaves, log_probs, tuned.model.score(world.histories, world.candidate_leaves))
    return {"tiger": Row(answer, tuned.training_seconds, tuned.model.parameters, speed, tuned.trials)}


def two_tower(run: Artefacts, world: World) -> tuple[Tuned[TwoTower], Trunk]:
    """The tuned head, and the served policy that it reads; the policies are trained where they are not yet."""
    validated(run)
    cut_us = run.config.timeline.cut_us
    before = load_catalogue(run.earlier, cut_us)
    known = {
        "validated": (before, read_events(run.config, before.item_ids, cut_us)),
        "policy": (world.catalogue, world.events),
    }
    trunks = []
    for name, (catalogue, events) in known.items():
        with storage.local_folder(run[name].path("checkpoint")) as local:
            trunks.append(Trunk(TorchEngine.load(local, catalogue.trie), catalogue, events, run.config))
    with progress("  two-tower head") as bar:
        timeline, seed = run.config.timeline, run.config.seed
        earlier, served = trunks
        tuned = tune_two_tower(earlier, served, timeline, TWO_TOWER_TRIALS, seed, lambda line: bar.advance(note=line))
    return tuned, served


def _two_tower(run: Artefacts, world: World) -> dict[str, Row]:
    tuned, served = two_tower(run, world)
    began = time.perf_counter()
    states = served.states(world.events, world.anchors)
    leaves, log_probs = tuned.model.generate(states, LIST)
    speed = len(leaves) / (time.perf_counter() - began)
    answer = Generated(leaves, log_probs, tuned.model.of_leaves(states, world.candidate_leaves))
    return {"two_tower": Row(answer, tuned.training_seconds, tuned.model.parameters, speed, tuned.trials)}


def _predict(id: str, run: Artefacts, folder: str, world: World) -> dict[str, Row]:
    trained = run["policy"]
    manifest = trained.read()
    if manifest is None:
        began = time.perf_counter()
        manifest = trained.finish(make_policy(run, trained), time.perf_counter() - began)
    else:
        trained.tidy()
    figures = manifest["figures"]
    with storage.local_folder(trained.path(folder)) as local:
        engine = TorchEngine.load(local, world.catalogue.trie)
    # A policy that saw no question does not know how one is answered.
    aligned = run.config.supervised.alignment_epochs > 0 and figures["alignment_questions"] > 0
    answer, speed = answer_of(engine, world, run.config, aligned, NAMES[id])
    row = Row(
        answer,
        parameters=figures["parameters"],
        users_per_second=speed,
        alignment_accuracy=figures["alignment_accuracy"],
        verdict_auc=figures["verdict_auc"],
        stages=figures["stages"],
    )
    return {id: row}
