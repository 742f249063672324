"""One stage, or all of them, as the command line and the jobs call them: log file, Ray, then the stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from conrec import storage
from conrec.artefact import Artefact
from conrec.blocklist import generate
from conrec.cluster import connect
from conrec.config import Config
from conrec.errors import TooLittleDataError
from conrec.progress import console, quiet, warn
from conrec.stages.catalogue import make_catalogue
from conrec.stages.enough import check_training
from conrec.stages.evaluate import evaluate_artefact, make_evaluation
from conrec.stages.inputs import catalogue_artefact, train_artefact
from conrec.stages.nightly import make_night, nightly_artefact
from conrec.stages.summary import print_summary
from conrec.stages.train import make_policy


class Stage(NamedTuple):
    """What a stage leaves, and the work that fills it and returns its figures."""

    artefact: Callable[[Config], Artefact]
    work: Callable[[Config, Artefact], dict[str, Any]]
    needs_ray: bool
    check: Callable[[Config], None] | None = None
    """What is asked before Ray starts: is there enough for the work to end in anything?"""


STAGES = {
    "catalogue": Stage(catalogue_artefact, make_catalogue, needs_ray=False),
    "train": Stage(train_artefact, make_policy, needs_ray=True, check=check_training),
    "evaluate": Stage(evaluate_artefact, make_evaluation, needs_ray=False),
    "nightly": Stage(nightly_artefact, make_night, needs_ray=True),
}
"""In the order in which they run; `nightly` does not read what `evaluate` leaves."""


def run_stage(name: str, config: Config) -> Artefact:
    """Runs one stage unless its artefact is complete; what libraries print goes to `<root>/logs/<stage>.log`."""
    stage = STAGES[name]
    artefact = stage.artefact(config)
    if artefact.read() is not None:
        console.print(f"{name} {artefact.version} is complete")
        return artefact
    with quiet(storage.join(config.root, "logs", f"{name}.log")):
        console.print(f"{name} {artefact.version}")
        if stage.check is not None:
            stage.check(config)
        began = time.perf_counter()
        if stage.needs_ray:
            connect(cores(config))
        artefact.finish(stage.work(config, artefact), time.perf_counter() - began)
    return artefact


def cores(config: Config) -> int:
    """Cores that the most demanding stage asks for."""
    return max(config.train.workers * config.train.cpus_per_worker, generate.cores(config.generate))


def run_all(config: Config, settings_path: str) -> None:
    """Runs every stage and ends with a summary; `settings_path` is named in the commands that it shows.

    Where there is nothing to evaluate, that is said and the night goes on: it does not read the evaluation.
    """
    for name in STAGES:
        try:
            run_stage(name, config)
        except TooLittleDataError as error:
            if name != "evaluate":
                raise
            warn(f"not evaluated: {error}")
    print_summary(config, settings_path)
