"""What a system from outside may see and must answer, as files: the very anchors that `conrec evaluate` measures."""

from __future__ import annotations

import contextlib

from conrec import storage
from conrec.config import Config
from conrec.errors import ArtefactError, ConfigError
from conrec.evaluation.predictions import FOLDER, Task
from conrec.stages.artefacts import Artefacts
from conrec.stages.policies import evaluated
from conrec.stages.systems import load_world


def write_anchors(config: Config, folder: str) -> Task:
    """Writes the tables of the task into the folder, any fsspec URL. Nothing needs to be trained or fitted.

    Raises `TooLittleDataError` where there is nothing to evaluate, `ConfigError` for a folder with histories of other
    anchors.
    """
    run = Artefacts(config)
    # A policy that is not trained yet will be trained on what these settings say.
    with contextlib.suppress(ArtefactError):
        run = evaluated(run)
    task = load_world(run, encoded=False).task
    tables = task.tables()
    histories = storage.join(folder, FOLDER)
    others = set(storage.list_files(histories)) - {f"{name.removeprefix(f'{FOLDER}/')}.parquet" for name in tables}
    if others:
        raise ConfigError(f"--out {folder}: {histories} holds {min(others)} of other anchors; name another folder")
    for name, table in tables.items():
        storage.write_table(table, storage.join(folder, f"{name}.parquet"))
    return task
