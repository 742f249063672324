"""Loading the published version into Redis, for serving that already asks one.

    conrec export redis --url redis://host:6379/0 --config my.toml

    conrec:<version>:<user>     a sorted set: item -> the time until which it is blocked, microseconds since 1970
    conrec:current              the version to ask; written last
    conrec:root                 the store whose keys these are; an export of another one is refused

`conrec` is the setting `publish.redis_prefix`: systems that share a Redis have one each.

A consumer reads `conrec:current`, then `ZMSCORE conrec:<version>:<user> item1 item2 ...`: an item is blocked if its
score is later than now. The rows of a user end at different times, hence scores; a key ends by itself with its last
row. Where the key is missing and `conrec:current` has changed meanwhile, ask again: the keys of other versions are
removed once the pointer is written. Rows only block here: those that fade are left to readers that can weigh.

Invariant: `conrec:current` names a version whose keys were all written. A run that was killed leaves it as it was, and
the next one writes the same keys again and removes what is of no use. No key is written or removed that does not begin
with the prefix, and none at all where the prefix belongs to another store. One export of a prefix at a time; a second
is refused. The password comes from the environment: an argument is seen in the list of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.errors import ConfigError, MissingDependencyError, PublishError
from conrec.serving import versions
from conrec.serving.rows import BLOCKING_REASONS, bucket_path, read_bucket, user_offsets

PASSWORD = "REDIS_PASSWORD"
"""Environment variable of the password."""
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


@dataclass(frozen=True)
class Keys:
    """The keys of one prefix, which holds no colon: none of them begins with those of another prefix."""

    prefix: str

    @property
    def pointer(self) -> str:
        """Names the version to ask."""
        return f"{self.prefix}:current"

    @property
    def owner(self) -> str:
        """Names the store that was exported."""
        return f"{self.prefix}:root"

    def of_version(self, version: str) -> str:
        """What the keys of a version begin with."""
        return f"{self.prefix}:{version}:"

    def of_user(self, version: str, user_id: str) -> str:
        """A user's sorted set."""
        return f"{self.of_version(version)}{user_id}"


def export_redis(root: str, url: str, prefix: str) -> Exported:
    """Writes the current version of the store `root`, points at it, and removes the keys of its other versions.

    Raises `ArtefactError` when nothing is published or a file is damaged, `ConfigError` for a URL that is none or holds
    a password, `PublishError` when Redis fails, the prefix belongs to another store, another export is running, or the
    store moves on meanwhile: `<prefix>:current` is unchanged then.
    """
    keys = Keys(prefix)
    named = versions.require_pointer(root)
    version, manifest = named["version"], versions.pointed_manifest(root, named)
    now_us = int(datetime.now(UTC).timestamp() * 1e6)
    users = rows = 0
    with connected(root, url, keys) as client:
        for bucket in range(manifest["buckets"]):
            path = bucket_path("data", bucket)
            table = _blocking(read_bucket(root, manifest, path, "data"), now_us)
            users += _write(client, keys, version, table, path)
            rows += len(table)
        now_named = versions.read_pointer(root)
        if now_named is None or now_named["manifest_sha256"] != named["manifest_sha256"]:
            raise PublishError(f"{root}: another version was published during the export of {version}; run again")
        client.set(keys.pointer, version)
        removed = _remove_others(client, keys, version)
    return Exported(version, users, rows, removed)


def _blocking(table: pa.Table, now_us: int) -> pa.Table:
    """The columns needed of the rows that block, ends in microseconds."""
    ends = table["demotes_at"].cast(pa.int64())
    reasons = table["reason"].combine_chunks().dictionary_encode()
    blocks = np.append(np.isin(reasons.dictionary.to_pylist(), BLOCKING_REASONS), False)[reasons.indices.to_numpy()]
    kept = pa.array(blocks & (ends.to_numpy() > now_us))
    return pa.table([table["user_id"], table["item_id"], ends], ["user_id", "item_id", "ends"]).filter(kept)


def _write(client: Any, keys: Keys, version: str, table: pa.Table, source: str) -> int:
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
            key = keys.of_user(version, name)
            pipeline.zadd(key, dict(zip(items[low:high], ends[low:high], strict=True)))
            pipeline.pexpireat(key, max(ends[low:high]) // 1000 + 1)
        pipeline.execute()
        start = stop
    return len(names)


def user_keys(client: Any, keys: Keys) -> Iterator[bytes]:
    """The keys of all users and versions, in a round trip for each thousand keys that Redis holds."""
    found: Iterator[bytes] = client.scan_iter(f"{keys.prefix}:*:*", count=_KEYS_AT_ONCE)
    return found


def _remove_others(client: Any, keys: Keys, version: str) -> int:
    own = keys.of_version(version).encode()
    removed = 0
    pipeline = client.pipeline(transaction=False)
    for key in user_keys(client, keys):
        if not key.startswith(own):
            pipeline.unlink(key)
            removed += 1
            if len(pipeline) >= _KEYS_AT_ONCE:
                pipeline.execute()
    pipeline.execute()
    return removed


@contextlib.contextmanager
def connected(root: str, url: str, keys: Keys) -> Iterator[Any]:
    """One connection to the keys of `root`, named so that a second one sees it: Redis forgets it when this process
    ends, however."""
    try:
        import redis  # noqa: F401
    except ImportError:
        raise MissingDependencyError('redis is not installed; in a checkout, pip install ".[redis]"') from None
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _no_url(error) from None
    if parts.password or "password" in parse_qs(parts.query):
        raise ConfigError(f"--url holds a password, which the list of processes shows: leave it out and set {PASSWORD}")
    place, name = parts.netloc.rpartition("@")[2] or parts.path, f"conrec-export:{keys.prefix}"
    with _told(place, keys), _client(url, name) as client:
        if sum(found["name"] == name for found in client.client_list()) > 1:
            raise PublishError(f"Redis at {place}: another export is running; let it finish")
        _claim(client, keys, root, place)
        yield client


@contextlib.contextmanager
def _client(url: str, name: str) -> Iterator[Any]:
    import redis

    try:
        client = redis.Redis.from_url(
            url, password=os.environ.get(PASSWORD), client_name=name, single_connection_client=True
        )
    except ValueError as error:
        raise _no_url(error) from None
    with contextlib.closing(client):
        yield client


def _no_url(error: ValueError) -> ConfigError:
    return ConfigError(f"--url: {error}; write redis://host:6379/0 or unix:///path/to/socket")


@contextlib.contextmanager
def _told(place: str, keys: Keys) -> Iterator[None]:
    """What Redis refuses or fails at, in words."""
    import redis

    try:
        yield
    except redis.AuthenticationError as error:
        raise PublishError(f"Redis at {place}: {error}; set {PASSWORD}, and name the user in --url") from None
    except redis.RedisError as error:
        raise PublishError(
            f"Redis at {place}: {type(error).__name__}: {error}; {keys.pointer} names what it named; start it, or name "
            "another with --url, and run again"
        ) from None


def _claim(client: Any, keys: Keys, root: str, place: str) -> None:
    """Makes the prefix that of `root`, unless it is another's."""
    own = storage.absolute(root)
    if client.set(keys.owner, own, nx=True):
        return
    owner = client.get(keys.owner)
    if owner is not None and owner.decode() != own:
        raise PublishError(
            f"Redis at {place}: {keys.owner} says that the keys of publish.redis_prefix = {keys.prefix!r} are those of "
            f"{owner.decode()}, and this is {own}: give it a prefix of its own, or delete {keys.owner} where the "
            "store has moved"
        )
