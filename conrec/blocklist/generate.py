"""Prompts of all users -> their most probable semantic IDs, judged, as a Ray Data job that resumes by user.

Read prompts -> an engine in an actor -> write, one row a user. Invariant: a user whose row was written is not generated
again, however often the night is killed and restarted; no row holds an ID that the user liked, or one ID twice.

    generate_night("night/prompts", "night/generated", "policy/checkpoint", trie, settings, "night/progress", users)

`progress` is Ray Data's checkpoint: a small Parquet file of user ids beside every file of output, written before it
as pending and renamed after it, so that what a kill leaves half-written is recognised and removed. It must be one
place that every node reaches, belongs to this prompts folder and this output folder, and stays afterwards: a second
call finds every user in it and starts nothing. On resuming, Ray Data filters the users in an actor that asks for one
core of its own: the cluster needs one more than the engines take.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conrec import storage
from conrec.blocklist.engines import Engine, TorchEngine, open_engine, require_cache
from conrec.catalogue.trie import Trie
from conrec.cluster import announced, connect, generation_need, mistake
from conrec.config import GenerateSettings
from conrec.progress import Bar, progress
from conrec.ragged import Ragged
from conrec.tables import GENERATED, PROMPTS

__all__ = ["Engine", "TorchEngine", "generate_night", "judged_beams"]

BATCHES_PER_FILE = 4
"""Calls of the engine per file of output, which is what a kill can lose per engine."""
POLL_SECONDS = 2.0


def judged_beams(
    engine: Engine, prompts: Ragged, excluded: Ragged, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The beams of each prompt less the excluded leaves, best first, and the verdicts on them.

    Shape: B rows of prompts and of excluded leaves -> leaves (B, width) int64, log-probabilities and verdicts
    (B, width) float32; -1, -inf and 0 behind the last leaf of a row.
    """
    leaves, log_probs, verdicts = engine.generate_and_judge(prompts, width)
    refused = _refused(leaves, excluded)
    columns = ((leaves, -1), (log_probs, -np.inf), (verdicts, 0))
    order = np.argsort(refused, axis=1, kind="stable")
    found = [np.take_along_axis(np.where(refused, padding, values), order, 1) for values, padding in columns]
    return found[0], found[1].astype(np.float32), found[2].astype(np.float32)


def _refused(leaves: np.ndarray, excluded: Ragged) -> np.ndarray:
    """Which leaves are padding or excluded in their row. Shape: (B, W), B rows of excluded leaves -> (B, W) bool."""
    largest = max(int(leaves.max(initial=0)), int(excluded.values.max(initial=0))) + 1
    row = np.arange(len(leaves))[:, None]
    return (leaves < 0) | np.isin(row * largest + leaves, excluded.rows * largest + excluded.values)


def generate_night(
    prompts_url: str,
    output_url: str,
    checkpoint_url: str,
    trie: Trie,
    settings: GenerateSettings,
    progress_url: str,
    users: int,
) -> int:
    """Generates for every user in `prompts_url` who is not in the output yet; returns for how many it did.

    Reads the table PROMPTS, one row a user, user ids distinct; writes the table GENERATED, in which `error` is null or
    says why nothing was generated. `users` is the number of rows in prompts_url.
    """
    done = _Finished(progress_url)
    before = done.count()
    with progress("  generating", users) as bar:
        bar.advance(before)
        if before < users:
            _run(prompts_url, output_url, checkpoint_url, trie, settings, progress_url, users, bar)
            bar.advance(done.count() - bar.done)
    return done.count() - before


def cores(settings: GenerateSettings) -> int:
    """Cores of the engines, and one for the actor with which Ray Data leaves out finished users."""
    return settings.engines * settings.cpus_per_engine + 1


def _run(
    prompts_url: str,
    output_url: str,
    checkpoint_url: str,
    trie: Trie,
    settings: GenerateSettings,
    progress_url: str,
    users: int,
    bar: Bar,
) -> None:
    import ray

    require_cache(storage.read_json(storage.join(checkpoint_url, "config.json")), settings)
    need = generation_need(settings)
    connect(cores(settings), need)
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
            },
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(size=settings.engines),
            num_cpus=settings.cpus_per_engine,
            num_gpus=1 if settings.use_gpu else None,
            resources={settings.node_resource: 1} if settings.node_resource else None,
        )
        with _watching(progress_url, bar), announced(need):
            generated.write_parquet(
                output_path, filesystem=writing, min_rows_per_file=rows_per_file, ray_remote_args={"num_cpus": 0}
            )
    except ray.exceptions.RayError as error:
        if (told := mistake(error)) is None:
            raise
        raise told from error
    finally:
        for name, value in theirs.items():
            setattr(context, name, value)


class _Generator:
    """The Ray Data actor that holds an engine."""

    def __init__(self, checkpoint_url: str, trie: Any, settings: GenerateSettings) -> None:
        import ray

        self.width = settings.beam_width
        with storage.local_folder(checkpoint_url) as folder:
            self.engine = open_engine(folder, ray.get(trie), settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        try:
            return generate_batch(self.engine, batch, self.width)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                # Raised again, Ray would retry on the dead engine for ever; a new actor starts a new engine.
                os._exit(1)
            raise


def generate_batch(engine: Engine, batch: pa.Table, width: int) -> pa.Table:
    """Rows of PROMPTS -> rows of GENERATED. A prompt that the engine cannot take gets an `error` and no leaves."""
    prompts = Ragged.from_arrow(batch["prompt"])
    too_long = prompts.lengths > engine.longest_prompt
    invalid = too_long | (prompts.lengths == 0)
    valid = np.flatnonzero(~invalid)
    excluded = Ragged.from_arrow(batch["excluded_leaves"]).take(valid)
    leaves, log_probs, verdicts = judged_beams(engine, prompts.take(valid), excluded, width)
    real = leaves >= 0
    lengths = np.zeros(len(prompts), np.int64)
    lengths[valid] = real.sum(1)
    errors = np.where(
        too_long,
        [f"prompt of {length} tokens, the engine takes {engine.longest_prompt}" for length in prompts.lengths],
        "empty prompt",
    )
    columns = {
        "user_id": batch["user_id"],
        "leaves": Ragged.from_lengths(leaves[real].astype(np.int32), lengths).to_arrow(),
        "log_probs": Ragged.from_lengths(log_probs[real], lengths).to_arrow(),
        "verdicts": Ragged.from_lengths(verdicts[real], lengths).to_arrow(),
        "error": pa.array(errors, pa.string(), mask=~invalid),
        "digest": batch["digest"],
    }
    return pa.table([columns[field.name] for field in GENERATED], names=GENERATED.names).cast(GENERATED)


class _Finished:
    """Counts the users in the committed files of Ray Data's checkpoint, each file once."""

    def __init__(self, progress_url: str) -> None:
        self.url = progress_url
        self._rows: dict[str, int] = {}

    def count(self) -> int:
        files, path = storage.arrow_filesystem(self.url)
        for name in storage.list_files(self.url):
            if name.endswith(".parquet") and ".pending" not in name and name not in self._rows:
                self._rows[name] = pq.read_metadata(f"{path}/{name}", filesystem=files).num_rows
        return sum(self._rows.values())


@contextmanager
def _watching(progress_url: str, bar: Bar) -> Iterator[None]:
    """Moves the bar while the driver waits for Ray."""
    stop = threading.Event()
    done = _Finished(progress_url)

    def watch() -> None:
        while not stop.wait(POLL_SECONDS):
            bar.advance(done.count() - bar.done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
