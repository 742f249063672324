"""A training that is killed behind its hours: what came of them is kept until the artefact is complete.

What Ray Train does is tested in policy/test_workers.py; here a function stands for it that trains nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from safetensors.torch import load
from test_enough_stages import STAGES, make, untrained  # noqa: F401 - a fixture

from conrec import storage
from conrec.artefact import UNFINISHED, Artefact
from conrec.config import Config
from conrec.evaluation.systems import BEFORE
from conrec.policy.model import build_model, trainable, write_tensors
from conrec.policy.samples import TrainingData
from conrec.policy.workers import Inputs, TrainedPolicy
from conrec.stages import train
from conrec.stages.artefacts import Artefacts
from conrec.stages.systems import load_world, systems

pytestmark = pytest.mark.long

ACCEPTED = {"stage_accepted": True, "best_step": 1, "lift_ratio": 2.0, "lift_chance": 0.01}
MEASURED = {f"{when}_{name}": 0.5 for when in ("before", "after") for name in ("fhr", "fph")}


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The phases of every training that was asked for."""
    asked: list[list[str]] = []

    def fit(inputs: Inputs, measure: Any, url: str, show: Callable[[dict[str, Any]], None]) -> TrainedPolicy:
        data = TrainingData.load(inputs.data_url)
        asked.append([*data.tasks, *data.stages])
        storage.write_bytes(storage.join(url, "run", "checkpoint"), b"hours")
        tensors = trainable(build_model(inputs.config, inputs.texts)[0])
        if data.tasks:
            write_tensors(tensors, inputs.start_url)
        rows: list[dict[str, Any]] = [{"phase": name, "step": 1, "loss": float("nan")} for name in asked[-1]]
        rows += [{"phase": name, **ACCEPTED, **MEASURED} for name in data.stages]
        return TrainedPolicy(rows, {name: value.detach() + 1 for name, value in tensors.items()})

    monkeypatch.setattr("conrec.policy.workers.fit", fit)
    return asked


@contextmanager
def killed_at(place: str) -> Iterator[None]:
    """One run that does not come to the end of this function, or of this artefact where it begins with `end of`."""
    finish, stage = Artefact.finish, place.removeprefix("end of ")

    def dies(*given: Any) -> None:
        raise InterruptedError(place)

    with pytest.MonkeyPatch.context() as patch:
        if stage == place:
            patch.setattr(train, place, dies)
        else:
            patch.setattr(
                Artefact, "finish", lambda self, *given: (dies if self.stage == stage else finish)(self, *given)
            )
        with pytest.raises(InterruptedError, match=place):
            yield


def trained(config: Config) -> Artefact:
    run = Artefacts(config)
    train.validated(run)
    return run["validated"]


def policy(config: Config) -> Artefact:
    run = Artefacts(config)
    train.make_policy(run, run["policy"])
    return run["policy"]


@pytest.mark.parametrize(
    "place", ["left_supervised", "end of supervised", "save_policy", "write_rows", "end of validated"]
)
def test_a_kill_behind_the_training_repeats_none_of_it(make, fitted, place: str) -> None:  # noqa: F811
    config = make(grpo={"stages": STAGES})
    with killed_at(place):
        trained(config)
    assert len(fitted) == 1 and fitted[0][-1] == STAGES[0]["name"]
    artefact = trained(config)
    assert len(fitted) == 1
    manifest = artefact.require()
    assert [row["phase"] for row in manifest["figures"]["stages"]] == [STAGES[0]["name"]]
    assert {name.split("/")[0] for name in manifest["files"]} == {"checkpoint", "supervised", "metrics.jsonl"}
    ends = [load(storage.read_bytes(artefact.path(name, "model.safetensors"))) for name in ("supervised", "checkpoint")]
    name = next(iter(ends[0]))
    assert (ends[1][name] - ends[0][name]).mean() == pytest.approx(1, abs=1e-3)
    assert len(train.read_rows(artefact)) == len(fitted[0]) + 1


def test_what_only_a_run_that_goes_on_needs_goes_with_the_next_one_at_the_latest(make, fitted) -> None:  # noqa: F811
    config = make(grpo={"stages": STAGES})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Artefact, "tidy", lambda self: None)
        artefact = trained(config)
    assert storage.exists(artefact.path(UNFINISHED, "ray", "run", "checkpoint"))
    trained(config)
    assert not storage.exists(artefact.path(UNFINISHED))
    assert len(fitted) == 1


def test_a_row_of_a_finished_policy_removes_what_a_kill_left_of_it(make) -> None:  # noqa: F811
    run = Artefacts(untrained(make()))
    left = run["policy"].path(UNFINISHED, "ray", "checkpoint")
    storage.write_bytes(left, b"hours")
    (row,) = (spec for spec in systems(run) if spec.id == BEFORE)
    row.rows(load_world(run))
    assert not storage.exists(left)


def test_supervised_phases_that_somebody_deleted_are_trained_again(make, fitted) -> None:  # noqa: F811
    config = make(grpo={"stages": STAGES})
    with killed_at("save_policy"):
        trained(config)
    start = Artefacts(config).earlier["supervised"]
    storage.remove(start.url)
    trained(config)
    assert fitted[1] == fitted[0] and len(fitted) == 2
    assert start.require()["files"].keys() == {"metrics.jsonl", "policy.safetensors"}


@pytest.mark.parametrize("steps", [1, 2])
def test_what_was_left_of_other_steps_is_not_taken(make, fitted, monkeypatch, steps: int) -> None:  # noqa: F811
    """The first training is made anew while the second waits, and may then accept another step of a stage."""
    config = make(grpo={"stages": STAGES})
    first = trained(config)
    with killed_at("save_policy"):
        policy(config)
    storage.remove(first.url)
    monkeypatch.setitem(ACCEPTED, "best_step", steps)
    made = policy(config)
    stages = [STAGES[0]["name"]]
    # The supervised phases of both stay. The stage of the first is trained anew, that of the second for other steps.
    assert fitted[2:] == [stages] * steps
    left = [storage.exists(made.path(UNFINISHED, name, "run", "checkpoint")) for name in ("ray", "ray-grpo")]
    assert left == [steps == 1, steps == 2]


def test_a_training_that_goes_on_is_shown_where_it_is(make, monkeypatch, capsys) -> None:  # noqa: F811
    config = make(grpo={"stages": [STAGES[0] | {"steps": 3}]})

    def fit(inputs: Inputs, measure: Any, url: str, show: Callable[[dict[str, Any]], None]) -> TrainedPolicy:
        show({"phase": STAGES[0]["name"], "step": 1, "loss": 1.0})
        raise InterruptedError

    monkeypatch.setattr("conrec.policy.workers.fit", fit)
    with pytest.raises(InterruptedError):
        trained(config)
    done, total = re.findall(r"stopped:   training: (\d+) of (\d+) in", capsys.readouterr().out)[0]
    assert int(done) == int(total) - 2


def test_a_training_that_was_killed_tells_what_it_took_in_all(make, monkeypatch, capsys) -> None:  # noqa: F811
    """The run that goes on sees rows of the stage alone, a third one none at all."""
    config, pause = make(grpo={"stages": STAGES}), 0.5
    runs = iter(["supervised", "stage", "nothing"])

    def fit(inputs: Inputs, measure: Any, url: str, show: Callable[[dict[str, Any]], None]) -> TrainedPolicy:
        data, name, run = TrainingData.load(inputs.data_url), STAGES[0]["name"], next(runs)
        storage.write_bytes(storage.join(url, "run", "checkpoint"), b"hours")
        tensors = trainable(build_model(inputs.config, inputs.texts)[0])
        supervised = [{"phase": task, "step": 1, "loss": 1.0} for task in data.tasks]
        stage = [{"phase": name, "step": 1, "loss": 1.0}, {"phase": name, **ACCEPTED, **MEASURED}]
        if run == "supervised":
            time.sleep(pause)
            for row in supervised:
                show(row)
            write_tensors(tensors, inputs.start_url)
        if run != "nothing":
            show(stage[0])
            time.sleep(pause)
            raise InterruptedError
        return TrainedPolicy(supervised + stage, tensors)

    monkeypatch.setattr("conrec.policy.workers.fit", fit)
    for _ in range(2):
        with pytest.raises(InterruptedError):
            trained(config)
    capsys.readouterr()
    artefact = trained(config)
    assert re.search(r"^    training: \d+ in", capsys.readouterr().out, re.MULTILINE), "all steps, not 0 of them"
    seconds = artefact.require()["figures"]["training_seconds"]
    assert pause <= seconds["supervised"] == Artefacts(config).earlier["supervised"].require()["seconds"]
    assert 2 * pause <= seconds["grpo"]
    assert 3 * pause <= sum(seconds.values()) <= artefact.require()["seconds"] + 0.2  # rounded, each
