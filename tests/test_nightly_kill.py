"""SIGKILL at random moments of the night: readers go on, and a rerun ends as if nothing had happened.

The nightly job itself, Ray and its engine included, is killed at 5 moments spread over its whole length. Most of that
length is start and generation; so the night is killed at 16 more moments of what follows the generation: resolve,
write, audit, publish, which needs no Ray. Jobs and nights are forked from a process that has imported what they need.
Moments are random with a fixed seed; a kill that falls after the end is followed by a fresh night.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import pytest

from conrec.cli import main
from conrec.config import Config, load_settings
from conrec.errors import ArtefactError
from conrec.policy.model import build_model, save_checkpoint
from conrec.serving.reader import BlocklistReader
from conrec.stages.artefacts import Artefacts
from conrec.stages.new_items import load_catalogue
from conrec.stages.nightly import make_night
from conrec.stages.policies import serving
from conrec.stages.run import run_stage
from conrec.stages.scoring import scoring
from conrec.stages.train import make_earlier_catalogue, write_rows

pytestmark = pytest.mark.ray

HOME = Path(__file__).parents[1]
SETTINGS = HOME / "examples" / "kuairand" / "conrec.toml"
USERS = 48
WHOLE_KILLS, LATE_KILLS = 5, 16
REDUCED = (
    'embedding.sources=["behaviour"]',
    "embedding.weights=[1.0]",
    "quantizer.codes=16",
    "model.hidden_size=64",
    "model.heads=2",
    "model.intermediate_size=64",
    "model.layers=2",
    "grpo.stages=[]",
    'generate.engine="torch"',
    f"generate.max_users={USERS}",
    "generate.beam_width=24",
    # Three files of 16 users, and so three points from which the generation goes on.
    "generate.batch_size=4",
    # A policy that has learnt nothing: whatever it says is predicted.
    "calibration.alpha=0.9",
    "guardrails.max_user_share=1",
    "guardrails.max_catalogue_share=1",
    "publish.holdout_share=0.1",
)
YESTERDAY = ("guardrails.predicted_days=5", "publish.buckets=3")
"""The settings of the version that readers have while tonight's is killed."""
MORNING = datetime(2022, 5, 9, tzinfo=UTC)
"""After the night of the example."""
FORKSERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["conrec.cli", "conrec.stages.nightly", "faiss", "ray.data", "s3fs"]
PRELOADED += ["transformers.models.auto.tokenization_auto"]
Row = tuple[Any, ...]


@dataclass(frozen=True)
class World:
    """A policy, and what its night gives when nobody disturbs it."""

    folder: Path
    settings: tuple[str, ...]
    tonight: dict[str, list[Row]]
    """Version -> the rows that readers see."""
    yesterday: dict[str, list[Row]]
    seconds: float
    """Length of the nightly job."""
    late_seconds: tuple[float, float]
    """Length of what follows the generation: until it begins to write, and from then on."""

    def fresh(self, published: bool, generated: bool) -> Path:
        """A root before the night: with yesterday's version or none, with the generation done or not."""
        root = self.folder / "run"
        shutil.rmtree(root / "nightly", ignore_errors=True)
        shutil.rmtree(root / "blocklists", ignore_errors=True)
        if generated:
            shutil.copytree(self.folder / "generated", root / "nightly")
        if published:
            shutil.copytree(self.folder / "yesterday", root / "blocklists")
        return root


def overrides(folder: Path) -> tuple[str, ...]:
    places = (f"root={folder}/run", f"interactions.path={folder}/interactions.parquet")
    return (*places, f"items.path={folder}/items.parquet", *REDUCED)


def job(settings: tuple[str, ...], token: str = "", log: Path | None = None) -> multiprocessing.process.BaseProcess:
    """`conrec nightly`, marked with `token`, as is all that it starts; a session of its own, as a job's is."""
    arguments = ["nightly", "--config", str(SETTINGS), *(part for setting in settings for part in ("--set", setting))]
    child = FORKSERVER.Process(target=command_line, args=(arguments, token, log or os.devnull))
    child.start()
    return child


def command_line(arguments: list[str], token: str, log: str | Path) -> None:
    os.setsid()
    os.environ["CONREC_KILLED"] = token
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["conrec", *arguments]
    main()


def run(settings: tuple[str, ...], log: Path) -> str:
    """What an undisturbed job says."""
    child = job(settings, log=log)
    child.join(600)
    assert child.exitcode == 0, log.read_text()[-3000:]
    return log.read_text()


def few_users(folder: Path) -> None:
    """The example's first users, and the items that they met."""
    interactions = parquet.read_table(HOME / "examples" / "kuairand" / "interactions.parquet")
    users = pc.unique(interactions["user_id"]).sort()[:1500]
    interactions = interactions.filter(pc.is_in(interactions["user_id"], value_set=users))
    items = parquet.read_table(HOME / "examples" / "kuairand" / "items.parquet")
    items = items.filter(pc.is_in(items["item_id"], value_set=pc.unique(interactions["item_id"])))
    parquet.write_table(interactions, folder / "interactions.parquet")
    parquet.write_table(items, folder / "items.parquet")


def save_untrained(config: Config) -> None:
    """A policy before its training, as the train stage leaves one: the night does not ask how good it is."""
    make_earlier_catalogue(Artefacts(config))
    model, tokenizer, _ = build_model(config, load_catalogue(Artefacts(config)).items["text"].to_pylist())
    for artefact in (Artefacts(config)["validated"], Artefacts(config)["policy"]):
        save_checkpoint(model, tokenizer, Path(artefact.path("checkpoint")))
        write_rows([], artefact)
        artefact.finish({"training_seconds": {}, "stages": []}, 0.0)


def in_child(run: Artefacts) -> multiprocessing.process.BaseProcess:
    """The night without its command line."""
    child = FORKSERVER.Process(target=make_night, args=(run, run["nightly"]))
    child.start()
    return child


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    few_users(folder)
    settings = overrides(folder)
    # What a killed night leaves in temporary folders goes with the fixture; a short path, for Ray's sockets.
    temporary = Path(tempfile.mkdtemp(prefix="ck"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("TMPDIR", "RAY_TMPDIR"):
            patch.setenv(name, str(temporary))
        patch.chdir(HOME)
        FORKSERVER.set_forkserver_preload(PRELOADED)
        config = load_settings(SETTINGS, settings)
        run_stage("catalogue", config)
        save_untrained(config)
        root = folder / "run"
        # Done once, by the first night; not measured.
        scoring(serving(Artefacts(config)))
        began = time.monotonic()
        run(settings, folder / "job.log")
        seconds = time.monotonic() - began
        tonight = seen(root)
        assert {"explicit", "predicted"} == {row[2] for rows in tonight.values() for row in rows}
        artefact = serving(Artefacts(config))["nightly"]
        shutil.copytree(root / "nightly", folder / "generated")
        (folder / "generated" / artefact.version / "artefact.json").unlink()
        shutil.rmtree(root / "blocklists")

        # The same generation under other settings is another version.
        earlier = serving(Artefacts(load_settings(SETTINGS, (*settings, *YESTERDAY))))
        earlier_artefact = earlier["nightly"]
        shutil.copytree(folder / "generated" / artefact.version, root / "nightly" / earlier_artefact.version)
        began = time.monotonic()
        child = in_child(earlier)
        (watermark,) = (name.split("-")[0] for name in tonight)
        wait_for_writing(child, root, f"{watermark}-{earlier_artefact.version}")
        writing = time.monotonic()
        child.join(300)
        assert child.exitcode == 0
        late_seconds = (writing - began, time.monotonic() - writing)
        yesterday = seen(root)
        shutil.copytree(root / "blocklists", folder / "yesterday")
        yield World(folder, settings, tonight, yesterday, seconds, late_seconds)
    shutil.rmtree(temporary, ignore_errors=True)


def seen(root: Path) -> dict[str, list[Row]]:
    """Version -> every row of every user, as the reader hands them out."""
    store = str(root / "blocklists")
    reader = BlocklistReader(store, clock=lambda: MORNING)
    table = parquet.read_table(f"{store}/versions/{reader.version}/data")
    rows = []
    for user in sorted(table["user_id"].unique().to_pylist()):
        blocklist = reader.blocklist(user)
        items = [row.item_id for row in blocklist]
        assert len(items) == len(set(items)), f"{user} has an item twice"
        blocked = {row.item_id for row in blocklist if row.demotes_at > MORNING}
        assert set(reader.filter(user, items)) == set(items) - blocked
        rows += [(user, *vars(row).values()) for row in blocklist]
    assert len(rows) == table.num_rows
    return {reader.version: rows}


def assert_same(found: dict[str, list[Row]], expected: dict[str, list[Row]]) -> None:
    """The same rows; similarity and score to rounding, since a batch of other users is another product of matrices."""
    assert found.keys() == expected.keys()
    (mine,), (theirs,) = found.values(), expected.values()
    numbers = [[row[3:5] for row in rows] for rows in (mine, theirs)]
    assert sorted(row[:3] + row[5:] for row in mine) == sorted(row[:3] + row[5:] for row in theirs)
    np.testing.assert_allclose(*(np.sort(np.array(pairs, float), axis=0) for pairs in numbers), rtol=1e-3)


def assert_readers_go_on(world: World, root: Path, published: bool) -> None:
    """Yesterday's version or tonight's, whole; before the first night the error that says so."""
    if not (root / "blocklists" / "CURRENT.json").exists():
        assert not published
        with pytest.raises(ArtefactError, match="nothing is published"):
            BlocklistReader(str(root / "blocklists"))
        return
    found = seen(root)
    if found.keys() == world.yesterday.keys():
        assert published
        assert found == world.yesterday
    else:
        assert_same(found, world.tonight)


def assert_nobody_twice(world: World, root: Path) -> None:
    """Neither generated, nor published, and whoever was asked for was answered for."""
    version = serving(Artefacts(load_settings(SETTINGS, world.settings)))["nightly"].version
    generated = parquet.read_table(root / "nightly" / version / "generated")["user_id"].to_pylist()
    assert len(generated) == len(set(generated)) == USERS
    (name,) = world.tonight
    data = root / "blocklists" / "versions" / name / "data"
    users = [set(parquet.read_table(file)["user_id"].to_pylist()) for file in data.glob("*.parquet")]
    assert sum(map(len, users)) == len(set().union(*users))


def kill_group(process: multiprocessing.process.BaseProcess, token: str) -> None:
    """SIGKILL to the job, to Ray's daemons and to the workers, as when the machine goes."""
    # Ray's processes leave the job's session; they inherit the environment.
    process.kill()
    process.join()
    while family := [one for one in psutil.process_iter() if belongs(one, token)]:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(family, timeout=30)


def belongs(process: psutil.Process, token: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CONREC_KILLED") == token
    except psutil.Error:
        return False


def test_the_nightly_job_killed_at_random_moments(world):
    rng = np.random.default_rng(0)
    window, killed = world.seconds, 0
    # One moment in each eighth of the night, so that every part of it is struck.
    shares = rng.permutation((np.arange(WHOLE_KILLS) + rng.random(WHOLE_KILLS)) / WHOLE_KILLS)
    while killed < WHOLE_KILLS:
        # Half of them hit the first night of all, half one after another version.
        published = killed >= WHOLE_KILLS // 2
        if killed in (0, WHOLE_KILLS // 2):
            root = world.fresh(published, generated=False)
        token = uuid.uuid4().hex
        night = job(world.settings, token)
        night.join(shares[killed] * window)
        kill_group(night, token)
        assert night.exitcode in (0, -signal.SIGKILL)
        assert_readers_go_on(world, root, published)
        if night.exitcode == 0:
            assert_same(seen(root), world.tonight)
            root = world.fresh(published, generated=False)
            window *= 0.8
        else:
            killed += 1
    run(world.settings, world.folder / "job.log")
    assert_same(seen(root), world.tonight)
    assert_nobody_twice(world, root)
    assert "is complete" in run(world.settings, world.folder / "job.log")


def test_the_night_killed_at_random_moments_after_its_generation(world):
    rng = np.random.default_rng(1)
    config = load_settings(SETTINGS, world.settings)
    run = serving(Artefacts(config))
    (version,) = world.tonight
    # In turns: from the start of the process, from the moment when it begins to write.
    windows, killed, left = list(world.late_seconds), 0, set[str]()
    while killed < LATE_KILLS:
        published = killed >= LATE_KILLS // 2
        if killed in (0, LATE_KILLS // 2):
            root = world.fresh(published, generated=True)
        child = in_child(run)
        if killed % 2:
            wait_for_writing(child, root, version)
        child.join(windows[killed % 2] * rng.random())
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        assert_readers_go_on(world, root, published)
        left.add(left_of(root, version))
        if (root / "blocklists" / "versions" / version / "manifest.json").exists():
            # What follows adopts it, and has nothing to write.
            assert_same(finished(run, root), world.tonight)
            root = world.fresh(published, generated=True)
            windows[killed % 2] *= 0.8
        killed += child.exitcode != 0
    assert {"nothing", "begun"} <= left
    assert_same(finished(run, root), world.tonight)
    assert_nobody_twice(world, root)


def finished(run: Artefacts, root: Path) -> dict[str, list[Row]]:
    """What readers see once a rerun has ended."""
    child = in_child(run)
    child.join(300)
    assert child.exitcode == 0
    return seen(root)


def wait_for_writing(child: multiprocessing.process.BaseProcess, root: Path, version: str) -> None:
    """Until a version is written by this process, or the process has ended."""
    lock = root / "blocklists" / "locks" / f"{version}.lock"
    while child.is_alive():
        with contextlib.suppress(FileNotFoundError, ValueError):
            if json.loads(lock.read_text())["pid"] == child.pid:
                return
        time.sleep(0.002)


def left_of(root: Path, version: str) -> str:
    """How far the publication of a version came."""
    folder = root / "blocklists" / "versions" / version
    if (folder / "manifest.json").exists():
        return "complete"
    return "begun" if any(folder.rglob("*.parquet")) else "nothing"
