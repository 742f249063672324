"""One stage, or all of them, as the command line and the jobs call them: log file, Ray, then the stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from conrec import storage
from conrec.artefact import Artefact
from conrec.cluster import Need, connect, generation_need, training_need
from conrec.config import Config
from conrec.errors import TooLittleDataError
from conrec.progress import console, quiet, warn
from conrec.spent import spent
from conrec.stages.artefacts import Artefacts
from conrec.stages.failure import telling
from conrec.stages.policies import evaluated, serving
from conrec.stages.sources import Sources

# Each loads libraries that the others do without, so they are imported when they run.


def _catalogue(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    from conrec.stages.catalogue import make_catalogue

    return make_catalogue(run if run.config.timeline.refit else run.earlier, artefact)


def _policy(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    from conrec.stages.train import make_policy

    return make_policy(run, artefact)


def _evaluation(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    from conrec.stages.evaluate import make_evaluation

    return make_evaluation(run, artefact)


def _night(run: Artefacts, artefact: Artefact) -> dict[str, Any]:
    from conrec.stages.nightly import make_night

    return make_night(run, artefact)


def _unserved(run: Artefacts, artefact: Artefact) -> str | None:
    from conrec.stages.nightly import lacking

    return lacking(run, artefact)


def _enough_to_train(run: Artefacts) -> None:
    from conrec.stages.enough import check_training

    check_training(run)


class Stage(NamedTuple):
    """What a stage leaves, and the work that fills it and returns its figures."""

    artefact: str
    """Its row in `conrec.stages.artefacts`."""
    work: Callable[[Artefacts, Artefact], dict[str, Any]]
    needs_ray: bool
    policy: Literal["trained at the cut", "any cut"] | None = None
    """Reads the policy that is served: only one that ends at the settings' cut will do, or any."""
    check: Callable[[Artefacts], None] | None = None
    """What is asked before Ray starts: is there enough for the work to end in anything?"""
    lacking: Callable[[Artefacts, Artefact], str | None] | None = None
    """Why a finished one is to be done again, or None."""
    finishes: bool = False
    """The work finishes the artefact, and writes none of its files after that; then its figures are still to come."""


STAGES = {
    "catalogue": Stage("catalogue", _catalogue, needs_ray=False),
    "train": Stage("policy", _policy, needs_ray=True, check=_enough_to_train),
    "evaluate": Stage("evaluation", _evaluation, needs_ray=False, policy="trained at the cut"),
    "nightly": Stage("nightly", _night, needs_ray=True, policy="any cut", lacking=_unserved, finishes=True),
}
"""In the order in which they run; `nightly` does not read what `evaluate` leaves."""


def run_stage(
    name: str, config: Config, refit: bool = False, sources: Sources | None = None, all_stages: bool = False
) -> Artefact:
    """Runs one stage unless its artefact is complete; what libraries print goes to `<root>/logs/<stage>.log`.

    `refit`: the catalogue is fitted on the items of today, though one with these settings is finished. `all_stages`:
    the others follow, so that what they ask of the cluster is asked before the first one trains for hours.
    """
    stage, log = STAGES[name], storage.join(config.root, "logs", f"{name}.log")
    command = config.nightly.on_failure if name == "nightly" else ()
    with telling(command, name, log), quiet(log):
        run = Artefacts(config, sources)
        if stage.policy is not None:
            run = evaluated(run) if stage.policy == "trained at the cut" else serving(run)
        artefact = run.exact(stage.artefact) if refit else run[stage.artefact]
        complete = artefact.read() is not None
        lacks = stage.lacking(run, artefact) if complete and stage.lacking is not None else None
        if lacks is not None:
            warn(f"{name} {artefact.version} is complete, but {lacks}")
        elif complete:
            artefact.tidy()
            console.print(f"{name} {artefact.version} is complete")
            if name == "catalogue" and artefact.version != run.exact(name).version:
                console.print(
                    "  the items have changed since: new ones are encoded with it, conrec catalogue --refit fits anew"
                )
            return artefact
        console.print(f"{name} {artefact.version}")
        if stage.check is not None:
            stage.check(run)
        with spent(artefact.url, ".spent.json") as seconds:
            if stage.needs_ray and not complete:
                for need in needs(config, name, all_stages):
                    connect(cores(config), need)
            figures = stage.work(run, artefact)
            (artefact.finish_again if stage.finishes else artefact.finish)(figures, seconds())
    return artefact


def needs(config: Config, name: str, all_stages: bool) -> list[Need]:
    """What a stage, or all of them, ask of the cluster."""
    training, generation = training_need(config.train), generation_need(config.generate)
    return [training, generation] if all_stages else [training if name == "train" else generation]


def cores(config: Config) -> int:
    """Cores that the most demanding stage asks for."""
    from conrec.blocklist import generate

    return max(config.train.workers * config.train.cpus_per_worker, generate.cores(config.generate))


def run_all(config: Config, settings_path: str) -> None:
    """Runs every stage and ends with a summary; `settings_path` is named in the commands that it shows.

    Where there is nothing to evaluate, that is said and the night goes on: it does not read the evaluation.
    """
    from conrec.stages.summary import print_summary

    sources, made = Sources(config), dict[str, Artefact]()
    for name in STAGES:
        try:
            made[name] = run_stage(name, config, sources=sources, all_stages=True)
        except TooLittleDataError as error:
            if name != "evaluate":
                raise
            warn(f"not evaluated: {error}")
    print_summary(config, settings_path, made)
