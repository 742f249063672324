"""Evaluate stage: the method beside what it must beat, on anchors that training never saw.

Every system leaves rows of predictions (`conrec.stages.systems`); `conrec.evaluation` measures and compares them.
Systems from outside, which leave a file of predictions (`conrec.evaluation.predictions`), are rows like the others, and
beside the floors alone need no policy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist.asking import Policy
from conrec.blocklist.engines import TorchEngine
from conrec.evaluation.assemble import Scored, beside_floors, beside_ours, tonight
from conrec.evaluation.baselines import FLOORS
from conrec.evaluation.document import Evaluation
from conrec.evaluation.headline import LISTS
from conrec.evaluation.measured import Measured, Outside, measure, outside
from conrec.evaluation.predictions import check_names
from conrec.evaluation.published_lists import published_lists
from conrec.evaluation.rows import Generated
from conrec.evaluation.systems import AFTER, COUNTED, FULL, NAMES
from conrec.evaluation.world import World
from conrec.report.report import write_report
from conrec.stages.artefacts import Artefacts
from conrec.stages.scoring import calibrating_answers, load_fitting, scoring
from conrec.stages.systems import load_world, systems
from conrec.stages.train import read_rows


def make_evaluation(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    """Leaves metrics.json, report.html and table.md."""
    evaluation = evaluate(run)
    if run.config.evaluation.systems != "floors":
        evaluation = dataclasses.replace(
            evaluation,
            quality=storage.read_json(run["catalogue"].path("quality.json")),
            training=read_rows(run["policy"]),
        )
    write_report(artefact.url, evaluation)
    return {"systems": list(evaluation.systems)}


def evaluate(run: Artefacts) -> Evaluation:
    """What the published lists do, every figure of every system, and the comparisons at equal harm."""
    specs, predictions = systems(run), run.sources.predictions
    check_names(predictions, (*(spec.name for spec in specs), NAMES[FULL], NAMES[COUNTED], *FLOORS, *LISTS))
    world = load_world(run, encoded=run.config.evaluation.systems != "floors")
    theirs = outside(world, predictions)
    table: dict[str, Measured] = {}
    for spec in specs:
        rows = spec.rows(world)
        table |= {id: measure(world, NAMES.get(id, id), spec.group, row) for id, row in rows.items()}
        if spec.id == "floors":
            table |= {f"outside: {name}": measure(world, name, "outside", row) for name, row in theirs.lists.items()}
    if run.config.evaluation.systems == "floors":
        return _with_choices(beside_floors(world, table, theirs.told), theirs)
    made, answer, policy = scoring(run), table[AFTER].row.answer, served_policy(run, world)
    assert isinstance(answer, Generated)
    scored, answers = Scored.of(world, table, made), tonight(world, policy, answer)
    published = published_lists(world, made, load_fitting(run), calibrating_answers(run), policy, answers, theirs.told)
    return _with_choices(beside_ours(world, table, scored, made, policy, published), theirs)


def _with_choices(evaluation: Evaluation, theirs: Outside) -> Evaluation:
    return dataclasses.replace(evaluation, systems=theirs.beside(evaluation.systems))


def served_policy(run: Artefacts, world: World) -> Policy:
    """The policy that is served, to be asked."""
    with storage.local_folder(run["policy"].path("checkpoint")) as folder:
        engine = TorchEngine.load(folder, world.catalogue.trie)
    return Policy(engine, world.catalogue, world.events, run.config)
