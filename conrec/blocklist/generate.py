"""Prompts of all users -> their most probable semantic IDs, judged, as a Ray Data job that resumes by user.

Read prompts -> an engine in an actor -> write, one row a user. Invariant: a user whose row was written is not generated
again, however often the night is killed and restarted; no row holds an ID that the user liked, or one ID twice. A user
on whom the engine fails gets an error, the others of the batch their IDs.

    generate_night("night/prompts", "night/generated", "policy/checkpoint", trie, settings, "night/progress", users)

`progress` is Ray Data's checkpoint: a small Parquet file of user ids beside every file of output, written before it
as pending and renamed after it, so that what a kill leaves half-written is recognised and removed. It must be one
place that every node reaches, belongs to this prompts folder and this output folder, and stays afterwards: a second
call finds every user in it and starts nothing. On resuming, Ray Data filters the users in an actor that asks for one
core of its own: the cluster needs one more than the engines take.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conrec import storage
from conrec.blocklist.batches import generate_batch, require_finite
from conrec.blocklist.cut_engine import EngineFullError
from conrec.blocklist.engines import Engine, open_engine, require_cache
from conrec.blocklist.meters import Meters
from conrec.blocklist.vllm_model import EngineGoneError
from conrec.catalogue.trie import Trie
from conrec.cluster import announced, connect, generation_need, mistake, tell_held
from conrec.config import GenerateSettings
from conrec.errors import ClusterError
from conrec.progress import Bar, progress
from conrec.tables import GENERATED, PROMPTS

BATCHES_PER_FILE = 4
"""Calls of the engine per file of output, which is what a kill can lose per engine."""
POLL_SECONDS = 2.0
ENGINE_RESTARTS = 5
"""How often one engine may be lost, with its process, its device or its node, before the night ends."""


def generate_night(
    prompts_url: str,
    output_url: str,
    checkpoint_url: str,
    trie: Trie,
    settings: GenerateSettings,
    progress_url: str,
    users: int,
    ends_at: datetime | None = None,
) -> int:
    """Generates for every user in `prompts_url` who is not in the output yet; returns how many are, of all runs.

    Reads the table PROMPTS, one row a user, user ids distinct; writes the table GENERATED, in which `error` is null or
    says why nothing was generated. `users` is the number of rows in prompts_url. No batch is begun from `ends_at` on,
    by the clock of the engine's node.
    """
    done = _Finished(progress_url)
    before = done.count()
    with progress("  generating", users) as bar:
        bar.advance(before)
        # Where a run was killed while it wrote, Ray takes away what it had not finished.
        if before < users and (not _passed(ends_at) or done.unfinished()):
            _run(prompts_url, output_url, checkpoint_url, trie, settings, progress_url, users, ends_at, bar)
            bar.advance(done.count() - bar.done)
    return done.count()


def cores(settings: GenerateSettings) -> int:
    """Cores of the engines, and one for the actor with which Ray Data leaves out finished users."""
    return settings.engines * settings.tensor_parallel * settings.cpus_per_engine + 1


def _run(
    prompts_url: str,
    output_url: str,
    checkpoint_url: str,
    trie: Trie,
    settings: GenerateSettings,
    progress_url: str,
    users: int,
    ends_at: datetime | None,
    bar: Bar,
) -> None:
    import ray

    require_cache(storage.read_json(storage.join(checkpoint_url, "config.json")), settings)
    need = generation_need(settings)
    connect(cores(settings), need)
    tell_held(need)
    context = ray.data.DataContext.get_current()
    files, progress_path = storage.arrow_filesystem(progress_url)
    ours = {
        "checkpoint_config": ray.data.checkpoint.CheckpointConfig(
            id_column="user_id",
            checkpoint_path=progress_path,
            delete_checkpoint_on_success=False,
            override_filesystem=files,
        ),
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # The second reader takes no number of blocks; one file of prompts would then be one file of output.
        "use_datasource_v2": False,
    }
    rows_per_file = BATCHES_PER_FILE * settings.batch_size
    theirs = {name: getattr(context, name) for name in ours}
    try:
        for name, value in ours.items():
            setattr(context, name, value)
        reading, prompts_path = storage.arrow_filesystem(prompts_url)
        writing, output_path = storage.arrow_filesystem(output_url)
        # Reading and writing ask for no core: they are light, and must never wait for one that an engine holds.
        prompts = ray.data.read_parquet(
            prompts_path,
            filesystem=reading,
            columns=PROMPTS.names,
            num_cpus=0,
            override_num_blocks=-(-users // rows_per_file),
        )
        generated = prompts.map_batches(
            _Generator,
            fn_constructor_kwargs={
                "checkpoint_url": storage.absolute(checkpoint_url),
                "trie": ray.put(trie),
                "settings": settings,
                "ends_at": ends_at,
            },
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(size=settings.engines),
            num_cpus=need.bundle["CPU"],
            num_gpus=need.bundle.get("GPU"),
            resources={settings.node_resource: 1} if settings.node_resource else None,
            max_restarts=ENGINE_RESTARTS,
            max_task_retries=ENGINE_RESTARTS,
        )
        with _watching(progress_url, bar), announced(need):
            generated.write_parquet(
                output_path, filesystem=writing, min_rows_per_file=rows_per_file, ray_remote_args={"num_cpus": 0}
            )
    except ray.exceptions.RayError as error:
        if (told := mistake(error) or _lost(error)) is None:
            raise
        raise told from error
    finally:
        for name, value in theirs.items():
            setattr(context, name, value)


def _lost(error: Exception) -> ClusterError | None:
    """That engines did not start, or were lost again and again; None where it is something else that ended the
    generation."""
    import ray

    lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)
    if not isinstance(error, lost):
        return None
    if "creation task" in str(error):
        # Behind the last line of the last traceback.
        cause = re.split(r"(?:\n[ \t].*)+\n", str(error).strip())[-1].splitlines()[0]
        return ClusterError(
            f"an engine did not start: {cause}; look at the memory and the device of the nodes, and at the worker's "
            "log of Ray. The same command goes on where it was"
        )
    return ClusterError(
        f"an engine was lost and started again {ENGINE_RESTARTS} times: its process, its device or its node went; look "
        "at the memory and the device of the nodes, and at the worker's log of Ray. The same command goes on where it "
        "was"
    )


def _passed(ends_at: datetime | None) -> bool:
    return ends_at is not None and datetime.now(UTC) >= ends_at


class _Generator:
    """The Ray Data actor that holds an engine."""

    def __init__(self, checkpoint_url: str, trie: Any, settings: GenerateSettings, ends_at: datetime | None) -> None:
        import ray

        self.width, self.ends_at = settings.beam_width, ends_at
        self.checkpoint_url, self.trie, self.settings = checkpoint_url, ray.get(trie), settings
        self.engine = self._open()
        require_finite(self.engine, checkpoint_url)
        self.meters = Meters()

    def __call__(self, batch: pa.Table) -> pa.Table:
        if _passed(self.ends_at):
            return GENERATED.empty_table()  # Ray Data holds finished who has a row: these are asked for again
        began = time.perf_counter()
        try:
            rows = self._rows(batch)
        except EngineGoneError as error:
            print(f"the engine is gone: {error}", file=sys.stderr, flush=True)
            # Raised again, Ray would give the dead engine the next batch; a new process starts a new engine.
            os._exit(1)
        self.meters.count(rows, time.perf_counter() - began)
        return rows

    def _rows(self, batch: pa.Table) -> pa.Table:
        while True:
            try:
                return generate_batch(self.engine, batch, self.width)
            except EngineFullError as error:
                print(f"the engine starts again with half as many: {error}", file=sys.stderr, flush=True)
                most = error.positions // 2
            self.engine = self._open(most)

    def _open(self, most: int = sys.maxsize) -> Engine:
        with storage.local_folder(self.checkpoint_url) as folder:
            return open_engine(folder, self.trie, self.settings, most)


class _Finished:
    """Counts the users in the committed files of Ray Data's checkpoint, each file once."""

    def __init__(self, progress_url: str) -> None:
        self.url = progress_url
        self._rows: dict[str, int] = {}

    def count(self) -> int:
        files, path = storage.arrow_filesystem(self.url)
        for name in _committed(self.url):
            if name not in self._rows:
                self._rows[name] = pq.read_metadata(f"{path}/{name}", filesystem=files).num_rows
        return sum(self._rows.values())

    def unfinished(self) -> bool:
        """Whether a file was written and not committed."""
        return any(".pending" in name for name in storage.list_files(self.url))


def _committed(progress_url: str) -> list[str]:
    return [name for name in storage.list_files(progress_url) if name.endswith(".parquet") and ".pending" not in name]


def committed_files(output_url: str, progress_url: str) -> list[str]:
    """Names of the files of output that are whole and stay, also while a run goes on: their checkpoint is committed."""
    done = {name.removesuffix(".parquet") for name in _committed(progress_url)}
    # Ray Data names a file of output by its checkpoint and a number.
    return [name for name in storage.list_files(output_url) if name.removesuffix(".parquet").rpartition("-")[0] in done]


@contextmanager
def _watching(progress_url: str, bar: Bar) -> Iterator[None]:
    """Moves the bar while the driver waits for Ray."""
    stop = threading.Event()
    done = _Finished(progress_url)

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            # A store that fails for long fails the work too, which says so.
            with suppress(OSError):
                bar.advance(done.count() - bar.done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
