"""Loading the published version into Redis, for serving that already asks one.

    conrec export redis --url redis://host:6379/0 --config my.toml

    conrec:<version>:<user>     a sorted set: item -> the time until which it is blocked, microseconds since 1970
    conrec:current              the version to ask; written last

A consumer reads `conrec:current`, then `ZMSCORE conrec:<version>:<user> item1 item2 ...`: an item is blocked if its
score is later than now. The rows of a user end at different times, hence scores; a key ends by itself with its last
row. Where the key is missing and `conrec:current` has changed meanwhile, ask again: the keys of other versions are
removed once the pointer is written. Rows only block here: those that fade are left to readers that can weigh.

Invariant: `conrec:current` names a version whose keys were all written. A run that was killed leaves it as it was, and
the next one writes the same keys again and removes what is of no use. One export at a time; a second is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa

from conrec.blocklist import versions
from conrec.blocklist.buckets import bucket_path
from conrec.blocklist.compiled import BLOCKING_REASONS, read_bucket, user_offsets
from conrec.errors import ConfigError, MissingDependencyError, PublishError

PREFIX = "conrec"
POINTER_KEY = f"{PREFIX}:current"
_CLIENT_NAME = "conrec-export"
_ROWS_AT_ONCE = 1 << 15
_KEYS_AT_ONCE = 1000


@dataclass(frozen=True)
class Exported:
    """What Redis holds after an export."""

    version: str
    users: int
    rows: int
    """Rows that block at the time of the export."""
    removed: int
    """Keys of other versions that were removed."""


def user_key(version: str, user_id: str) -> str:
    """The key of a user's sorted set."""
    return f"{PREFIX}:{version}:{user_id}"


def export_redis(root: str, url: str) -> Exported:
    """Writes the current version of the store `root`, points at it, and removes the keys of all others.

    Raises `ArtefactError` when nothing is published or a file is damaged, `PublishError` when Redis fails, another
    export is running, or the store moves on meanwhile: `conrec:current` is unchanged then.
    """
    named = versions.require_pointer(root)
    version, manifest = named["version"], versions.pointed_manifest(root, named)
    now_us = int(datetime.now(UTC).timestamp() * 1e6)
    users = rows = 0
    with _connected(url) as client:
        for bucket in range(manifest["buckets"]):
            path = bucket_path("data", bucket)
            table = _blocking(read_bucket(root, manifest, path, "data"), now_us)
            users += _write(client, version, table, path)
            rows += len(table)
        now_named = versions.read_pointer(root)
        if now_named is None or now_named["manifest_sha256"] != named["manifest_sha256"]:
            raise PublishError(f"{root}: another version was published during the export of {version}; run again")
        client.set(POINTER_KEY, version)
        removed = _remove_others(client, version)
    return Exported(version, users, rows, removed)


def _blocking(table: pa.Table, now_us: int) -> pa.Table:
    """The columns needed of the rows that block, ends in microseconds."""
    ends = table["demotes_at"].cast(pa.int64())
    reasons = table["reason"].combine_chunks().dictionary_encode()
    blocks = np.append(np.isin(reasons.dictionary.to_pylist(), BLOCKING_REASONS), False)[reasons.indices.to_numpy()]
    kept = pa.array(blocks & (ends.to_numpy() > now_us))
    return pa.table([table["user_id"], table["item_id"], ends], ["user_id", "item_id", "ends"]).filter(kept)


def _write(client: Any, version: str, table: pa.Table, source: str) -> int:
    """Writes the sorted sets of a bucket's users, some thousand rows in one round trip; returns the number of users."""
    names, offsets = user_offsets(table, source)
    start = 0
    while start < len(names):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + _ROWS_AT_ONCE, side="right")) - 1)
        first = int(offsets[start])
        part = table.slice(first, int(offsets[stop]) - first)
        items, ends = part["item_id"].to_pylist(), part["ends"].to_pylist()
        pipeline = client.pipeline(transaction=False)
        borders = (offsets[start : stop + 1] - first).tolist()
        for name, low, high in zip(names.slice(start, stop - start).to_pylist(), borders, borders[1:], strict=False):
            key = user_key(version, name)
            pipeline.zadd(key, dict(zip(items[low:high], ends[low:high], strict=True)))
            pipeline.pexpireat(key, max(ends[low:high]) // 1000 + 1)
        pipeline.execute()
        start = stop
    return len(names)


def _remove_others(client: Any, version: str) -> int:
    removed = 0
    pipeline = client.pipeline(transaction=False)
    for key in client.scan_iter(f"{PREFIX}:*:*", count=_KEYS_AT_ONCE):
        if not key.startswith(f"{PREFIX}:{version}:".encode()):
            pipeline.unlink(key)
            removed += 1
            if len(pipeline) >= _KEYS_AT_ONCE:
                pipeline.execute()
    pipeline.execute()
    return removed


@contextlib.contextmanager
def _connected(url: str) -> Iterator[Any]:
    """One connection, named so that a second export sees it: Redis forgets it when this process ends, however."""
    try:
        import redis
    except ImportError:
        raise MissingDependencyError('redis is not installed; install the extra: pip install "conrec[redis]"') from None
    # Without user and password, which a URL may hold and a log must not.
    place = urlsplit(url).netloc.rpartition("@")[2] or urlsplit(url).path
    try:
        client = redis.Redis.from_url(url, client_name=_CLIENT_NAME, single_connection_client=True)
    except ValueError as error:
        raise ConfigError(f"--url: {error}; write redis://host:6379/0 or unix:///path/to/socket") from None
    except redis.RedisError as error:
        raise PublishError(f"Redis at {place}: {error}; start it, or name another with --url") from None
    try:
        named = [found["id"] for found in client.client_list() if found["name"] == _CLIENT_NAME]
        if len(named) > 1:
            raise PublishError(f"Redis at {place}: another export is running; let it finish")
        yield client
    except redis.RedisError as error:
        raise PublishError(
            f"Redis at {place}: {type(error).__name__}: {error}; {POINTER_KEY} names a whole version, run again"
        ) from None
    finally:
        client.close()
