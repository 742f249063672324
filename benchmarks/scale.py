"""What a night takes as users grow: seconds and peak memory of each phase, a fresh process for each number of users.

Of the driver and of Ray's workers, where a phase has any: CPU of both together, and the peak of the largest worker,
which counts what it maps of Ray's shared memory.

    python benchmarks/scale.py                 # 10,000, 100,000 and 1,000,000 users; writes benchmarks/scale.json
    python benchmarks/scale.py 8000 25156 75468
    python benchmarks/scale.py log             # the log alone, of 10 and 100 million events
    python benchmarks/scale.py log 1000000

The users are those of examples/kuairand over and over under other ids, with their real histories, in a file of the log
for every 25,156 of them. Catalogue and policy (of the example's size, which has learnt nothing: asking it costs the
same) are made once, and a threshold. Each copy of a history is more evidence on the same items, and the threshold
stays: without a cap, lists grow from 133 to 923 rows, so here they end at 100, which most then have.
What the policy generates is
recorded once, for every user of the example whom a night serves, and read again for their copies: the engines' time
follows the number of users and nothing else. A bucket has 1,000 users, whatever their number. The catalogue stays what
it is: what grows here is users alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.config import Config, load_settings
from conrec.feedback.labels import read_items
from conrec.policy.model import build_model, save_checkpoint
from conrec.serving.mirror import mirror
from conrec.serving.reader import BlocklistReader
from conrec.stages.artefacts import Artefacts
from conrec.stages.deadline import Reached
from conrec.stages.inputs import blocklists_url, read_log
from conrec.stages.new_items import load_catalogue
from conrec.stages.night_prompts import Plan, write_prompts
from conrec.stages.nightly import Tonight, generate, publish_lists
from conrec.stages.policies import serving
from conrec.stages.run import run_stage
from conrec.stages.scoring import load_fitting
from conrec.stages.show import Pictures
from conrec.stages.train import make_earlier_catalogue, write_rows

HOME = Path(__file__).parents[1]
EXAMPLE = HOME / "examples" / "kuairand"
RESULTS = HOME / "benchmarks" / "scale.json"
ROOT = HOME / "runs" / "scale"
SIZES = (10_000, 100_000, 1_000_000)
LOGS = (10_000_000, 100_000_000)
USERS_PER_BUCKET = 1_000
USERS_PER_BUCKET_OF_A_LOG = 10_000
ROWS_OF_A_LIST = 100
PARTS = ("catalogue", "validated", "policy")


def main(sizes: list[int]) -> None:
    """Makes the base where it is missing, then each size in a process of its own."""
    if not (ROOT / "base" / "recorded").exists():
        _process("base")
    rows = [json.loads(_process(str(size)).splitlines()[-1]) for size in sizes]
    _write({"nights": rows, "growth": [growth(*pair) for pair in pairwise(rows)]})


def logs(sizes: list[int]) -> None:
    """Divides and orders logs of so many events, each in a process of its own."""
    _write({"logs": [json.loads(_process("log", str(size)).splitlines()[-1]) for size in sizes]})


def _write(figures: dict[str, Any]) -> None:
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    document |= {"cores": len(os.sched_getaffinity(0)), "users_per_bucket": USERS_PER_BUCKET} | figures
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def growth(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """From one size to the next, as ratios: CPU a user and peak memory, 1 is linear and flat; and of all phases
    together how many times the seconds, beside how many times the users.
    """
    seconds, wall, peaks, workers = (
        {name: [row["phases"][name][what] for row in (small, large)] for name in small["phases"]}
        for what in ("cpu_seconds", "seconds", "peak_mib", "worker_peak_mib")
    )
    times = large["users"] / small["users"]

    def more(of: dict[str, list[float]], together: Callable[[list[float]], float]) -> float | None:
        early, late = (together([pair[side] for pair in of.values()]) for side in (0, 1))
        return round(late / early, 3) if early else None

    return {
        "users": [small["users"], large["users"]],
        "cpu_seconds_a_user": {
            name: round(late / early / times, 3) for name, (early, late) in seconds.items() if early
        },
        "peak": {name: round(late / early, 3) for name, (early, late) in peaks.items()},
        "seconds_in_all": [round(sum(pair[side] for pair in wall.values()), 1) for side in (0, 1)],
        "times_the_users": round(times, 3),
        "times_the_seconds": more(wall, sum),
        "times_the_cpu_seconds": more(seconds, sum),
        "times_the_peak": more(peaks, max),
        "times_the_peak_of_a_worker": more(workers, max),
    }


def _process(*what: str) -> str:
    command = [sys.executable, __file__, "--", *what]
    done = subprocess.run(command, cwd=HOME, check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.stdout


def settings(name: str, users: int | None = None, per_bucket: int = USERS_PER_BUCKET) -> Config:
    """The example's, for so many users."""
    config = load_settings(EXAMPLE / "conrec.toml", [f"root={ROOT / name}", "generate.engine=torch"])
    document = config.model_dump(mode="json")
    document["generate"]["max_users"] = None
    document["guardrails"]["max_items_per_user"] = ROWS_OF_A_LIST
    if users is not None:
        document["interactions"]["path"] = str(ROOT / name / "log")
        document["publish"]["buckets"] = max(1, users // per_bucket)
    return Config.model_validate(document)


def make_base() -> None:
    """Catalogue, a policy before its training, and what it generates for everybody whom a night here serves."""
    shutil.rmtree(ROOT / "base", ignore_errors=True)
    config = settings("base")
    run_stage("catalogue", config)
    make_earlier_catalogue(Artefacts(config))
    model, tokenizer, _ = build_model(config, load_catalogue(Artefacts(config)).items["text"].to_pylist())
    for name in PARTS[1:]:
        artefact = Artefacts(config)[name]
        save_checkpoint(model, tokenizer, Path(artefact.path("checkpoint")))
        write_rows([], artefact)
        artefact.finish({"training_seconds": {}, "stages": []}, 0.0)
    run = serving(Artefacts(config))
    night = run["nightly"]
    read = Tonight.read(run, night)
    plan = write_prompts(run, read.catalogue, read.log, read.asked, night)
    generate(run, night, read.catalogue, plan, None)
    storage.write_table(storage.read_table(night.path("generated")), str(ROOT / "base" / "recorded" / "rows.parquet"))
    print(f"{plan.asked} users of the example are recorded")


def write_log(users: int, folder: Path) -> int:
    """The raw log of so many users in files; returns the number of events."""
    table = parquet.read_table(EXAMPLE / "interactions.parquet")
    names = table["user_id"].unique()
    events = 0
    for copy, start in enumerate(range(0, users, len(names))):
        part = table
        if users - start < len(names):
            part = part.filter(pc.is_in(part["user_id"], value_set=names.slice(0, users - start)))
        storage.write_table(_copied(part, copy), str(folder / f"{copy:05d}.parquet"))
        events += len(part)
    return events


def replay(url: str, copies: int, plan: Plan) -> None:
    """Leaves in a night what was recorded, for each of the users that it asked for."""
    rows = storage.read_table(str(ROOT / "base" / "recorded" / "rows.parquet"))
    asked = storage.read_table(storage.join(url, "prompts"), columns=["user_id"])["user_id"].combine_chunks()
    found = 0
    for copy in range(copies):
        part = _copied(rows, copy)
        part = part.filter(pc.is_in(part["user_id"], value_set=asked))
        storage.write_table(part, storage.join(url, "generated", f"{copy:05d}.parquet"))
        found += len(part)
    assert found == plan.asked, (found, plan.asked)


def _copied(table: pa.Table, copy: int) -> pa.Table:
    place = table.column_names.index("user_id")
    return table.set_column(place, "user_id", pc.binary_join_element_wise(table["user_id"], str(copy), "-"))


class Phases:
    """Seconds and peak resident memory of each phase."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = {pid: seconds for pid, (seconds, _) in _workers(anew=True).items()}
        _peak_anew(os.getpid())
        seen: dict[int, tuple[float, float]] = {}
        ended = threading.Event()

        def look() -> None:  # a worker may end before the phase does
            while not ended.wait(1.0):
                seen.update(_workers())

        looker = threading.Thread(target=look)
        looker.start()
        began, used = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            ended.set()
            looker.join()
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        seen |= _workers()
        self.measured[name] = {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu + sum(one - before.get(pid, 0.0) for pid, (one, _) in seen.items()), 2),
            "peak_mib": round(_peak_mib(os.getpid())),
            "worker_peak_mib": round(max((peak for _, peak in seen.values()), default=0.0)),
        }
        print(f"  {name:12}", self.measured[name], file=sys.stderr, flush=True)


def _workers(anew: bool = False) -> dict[int, tuple[float, float]]:
    """CPU seconds and peak of Ray's worker processes of this driver; `anew`: their peaks begin again."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError, IndexError):  # it ended meanwhile
            if child.name().startswith("ray::"):
                times = child.cpu_times()
                found[child.pid] = times.user + times.system, _peak_mib(child.pid)
                if anew:
                    _peak_anew(child.pid)
    return found


def _peak_anew(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _peak_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def one_size(users: int) -> None:
    """Prints the figures of a night of so many users as one line of JSON."""
    name = str(users)
    shutil.rmtree(ROOT / name, ignore_errors=True)
    config, base = settings(name, users), Artefacts(settings("base"))
    events = write_log(users, ROOT / name / "log")
    for part in PARTS:
        for here, there in ((Artefacts(config), base), (Artefacts(config).earlier, base.earlier)):
            if part != "catalogue" and here.config.timeline.cut != config.timeline.cut:
                continue
            shutil.copytree(there[part].url, here[part].url)
            here[part].finish(there[part].require()["figures"], 0.0)
    shutil.rmtree(ROOT / name / "inputs", ignore_errors=True)

    phase = Phases()
    with phase("digests"):
        run = serving(Artefacts(config))
        night = run["nightly"]
    with phase("counts"):
        load_fitting(run)
    recorded = serving(base)["calibration"]
    shutil.copytree(recorded.url, run["calibration"].url)
    run["calibration"].finish(recorded.require()["figures"], 0.0)
    with phase("read"):
        read = Tonight.read(run, night)
    with phase("prompts"):
        plan = write_prompts(run, read.catalogue, read.log, read.asked, night)
    replay(night.url, -(-users // 25_156), plan)
    with phase("publish"):
        manifest = publish_lists(run, night, read, Reached(plan.kept, plan.asked, 0, 0))
    night.finish({"version": manifest["version"]}, 0.0)
    del read
    with phase("mirror"):
        mirror(blocklists_url(config), str(ROOT / name / "mirror"))
    with phase("reader"):
        BlocklistReader(str(ROOT / name / "mirror"))
    with phase("show"):
        first = storage.read_table(storage.join(night.url, "prompts", "000000.parquet"))["user_id"][0].as_py()
        Pictures.load(config, [first]).show(first)
    figures: dict[str, Any] = {"users": users, "events": events, "asked": plan.asked, "buckets": config.publish.buckets}
    figures |= {"rows": manifest["figures"]["rows"], "phases": phase.measured}
    shutil.rmtree(ROOT / name, ignore_errors=True)
    print(json.dumps(figures))


def one_log(events: int) -> None:
    """Prints what it takes to read a log of so many events, in files, and to order every bucket."""
    name = f"log-{events}"
    shutil.rmtree(ROOT / name, ignore_errors=True)
    users = round(events / 222_869 * 25_156)
    config = settings(name, users, USERS_PER_BUCKET_OF_A_LOG)
    written = write_log(users, ROOT / name / "log")
    items = read_items(config.items)["item_id"].combine_chunks()
    phase = Phases()
    with phase("divide"):
        log = read_log(config, items, config.publish.buckets)
    with phase("order"):
        ordered = sum(len(bucket) for bucket in log)
    with phase("read again"):
        assert sum(len(bucket) for bucket in log) == ordered == log.events
    shutil.rmtree(ROOT / name)
    seconds = sum(phase.measured[part]["seconds"] for part in ("divide", "order"))
    figures = {"events": written, "users": users, "buckets": log.buckets, "events_a_second": round(written / seconds)}
    print(json.dumps(figures | {"phases": phase.measured}))


def run() -> None:
    """What the arguments ask for."""
    arguments = sys.argv[1:]
    if arguments[:2] == ["--", "base"]:
        make_base()
    elif arguments[:2] == ["--", "log"]:
        one_log(int(arguments[2]))
    elif arguments[:1] == ["--"]:
        one_size(int(arguments[1]))
    elif arguments[:1] == ["log"]:
        logs([int(size) for size in arguments[1:]] or list(LOGS))
    else:
        main([int(size) for size in arguments] or list(SIZES))


if __name__ == "__main__":
    os.environ.setdefault("RAY_worker_niceness", "0")
    run()
