"""One stage, or all of them, as the command line and the jobs call them: log file, Ray, then the stage."""

from __future__ import annotations

from collections.abc import Callable

from conrec import storage
from conrec.artefact import Artefact
from conrec.config import Config
from conrec.progress import quiet
from conrec.stages.catalogue import run_catalogue
from conrec.stages.cluster import connect
from conrec.stages.evaluate import run_evaluate
from conrec.stages.nightly import run_nightly
from conrec.stages.summary import print_summary
from conrec.stages.train import run_train

STAGES: dict[str, Callable[[Config], Artefact]] = {
    "catalogue": run_catalogue,
    "train": run_train,
    "evaluate": run_evaluate,
    "nightly": run_nightly,
}
"""In the order in which they run; `nightly` does not read what `evaluate` leaves."""


def run_stage(name: str, config: Config) -> Artefact:
    """Runs one stage; what libraries print goes to `<root>/logs/<stage>.log`."""
    with quiet(storage.join(config.root, "logs", f"{name}.log")):
        stage = STAGES[name]
        if name in ("train", "nightly"):
            connect(config)
        return stage(config)


def run_all(config: Config, settings_path: str) -> None:
    """Runs every stage and ends with a summary; `settings_path` is named in the commands that it shows."""
    for name in STAGES:
        run_stage(name, config)
    print_summary(config, settings_path)
