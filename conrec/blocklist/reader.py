"""What serving uses: opens the current version of a store and drops blocked items from candidates.

    reader = BlocklistReader("s3://bucket/blocklists")
    reader.filter("alice", ["item1", "item2"])      # what survives, in the same order
    reader.refresh()                                # between requests: picks up a newer version

Invariant: one version is read whole, verified against its manifest, and then replaced by one assignment, so a request
sees one version only and any number of threads may ask. Serving fails open: an unknown user, an unknown reason or a row
past its expiry blocks nothing. A damaged version does not: opening it raises, and `refresh` keeps the last good one.

Needs pyarrow, fsspec and numpy only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec.blocklist import versions
from conrec.blocklist.buckets import bucket_of, bucket_path
from conrec.errors import ArtefactError, DataError
from conrec.tables import BLOCKLIST, check

BLOCKING_REASONS = ("explicit", "predicted")
"""Rows with any other reason, of a later release say, block nothing."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class BlockedItem:
    """One row of a user's blocklist."""

    item_id: str
    reason: str
    similarity: float
    """Of the item to the semantic ID that caught it; 1 for an explicit rejection."""
    score: float
    """Generation probability times similarity; 1 for an explicit rejection."""
    semantic_id: str | None
    """The generated ID that caught it; None for an explicit rejection."""
    expires_at: datetime


class BlocklistReader:
    """A pinned version of the blocklists below `root`, any fsspec URL.

    `clock` says what is now, for expiry and age; replaying a night of the past needs another one than the wall's.
    Raises `ArtefactError` when nothing was published, or the current version is damaged.
    """

    def __init__(self, root: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._root = root
        self._clock = clock
        self._pinned = _open(root, None)

    def refresh(self) -> bool:
        """Pins the version that is current now; returns whether it is another one.

        Raises `ArtefactError` when that one is damaged; the reader goes on with the last good one.
        """
        newer = _open(self._root, self._pinned)
        changed = newer is not self._pinned
        self._pinned = newer
        return changed

    @property
    def version(self) -> str:
        """Name of the pinned version."""
        return self._pinned.name

    @property
    def watermark(self) -> datetime:
        """Time until which interactions went into the pinned version."""
        return self._pinned.watermark

    def age(self) -> timedelta:
        """Time since the pinned version was published."""
        return self._clock() - self._pinned.published_at

    def filter(self, user_id: str, item_ids: Iterable[str]) -> list[str]:
        """The items that are not blocked for the user, in their order; all of them for an unknown user."""
        blocked = self._pinned.blocked(user_id, self._now_us())
        return [item_id for item_id in item_ids if item_id not in blocked]

    def filter_batch(self, user_ids: Sequence[str], item_ids: Sequence[Iterable[str]]) -> list[list[str]]:
        """`filter` for several users, all from one version; item_ids has one list for each user."""
        pinned, now_us = self._pinned, self._now_us()
        survivors = []
        for user_id, candidates in zip(user_ids, item_ids, strict=True):
            blocked = pinned.blocked(user_id, now_us)
            survivors.append([item_id for item_id in candidates if item_id not in blocked])
        return survivors

    def explain(self, user_id: str, item_id: str) -> BlockedItem | None:
        """Why the item is blocked for the user now; None when it is not."""
        pinned, now_us = self._pinned, self._now_us()
        if item_id not in pinned.blocked(user_id, now_us):
            return None
        return next(row for row in pinned.rows(user_id) if row.item_id == item_id)

    def blocklist(self, user_id: str) -> list[BlockedItem]:
        """All rows of the user as published, explicit ones first, then by score; past ones too."""
        return self._pinned.rows(user_id)

    def _now_us(self) -> int:
        return (self._clock() - _EPOCH) // timedelta(microseconds=1)


class _Bucket:
    """The rows of one file: users as sorted bytes for binary search, everything else as arrays beside them."""

    def __init__(self, table: pa.Table, path: str) -> None:
        users = table["user_id"].combine_chunks()
        starts = pc.not_equal(users.slice(min(1, len(users))), users.slice(0, max(0, len(users) - 1)))
        first = np.concatenate(([0], np.flatnonzero(starts.to_numpy(zero_copy_only=False)) + 1)).astype(np.int64)
        first = first[: len(users)]
        distinct = users.take(pa.array(first)).cast(pa.large_binary())
        ascends = pc.less(distinct.slice(0, max(0, len(distinct) - 1)), distinct.slice(min(1, len(distinct))))
        if not pc.all(ascends).as_py() and len(distinct) > 1:
            raise ArtefactError(f"{path}: damaged: users are not ascending; roll back to another version")
        self._ends = memoryview(distinct.buffers()[1]).cast("q")[distinct.offset : distinct.offset + len(distinct) + 1]
        self._ids = memoryview(distinct.buffers()[2] or b"").cast("B")  # Arrow's are signed: not equal to bytes
        self._offsets = memoryview(np.append(first, len(users)).data)
        self._users = range(len(distinct))
        reason = table["reason"].combine_chunks().dictionary_encode()
        self._reasons = reason.dictionary.to_pylist()
        self._reason = reason.indices.to_numpy().astype(np.int8 if len(self._reasons) < 128 else np.int32)
        blocks = np.array([reason in BLOCKING_REASONS for reason in self._reasons], bool)
        self._expires_us = table["expires_at"].cast(pa.int64()).to_numpy()
        # A row that never blocks ends before every time: one comparison decides while serving.
        self._until_us = np.where(blocks[self._reason], self._expires_us, np.iinfo(np.int64).min)
        items = table["item_id"].combine_chunks().dictionary_encode()
        self._item_ids = items.dictionary.to_pylist()
        self._item = items.indices.to_numpy()
        semantic = table["semantic_id"].combine_chunks().dictionary_encode()
        self._semantic_ids = [*semantic.dictionary.to_pylist(), None]
        self._semantic = pc.fill_null(semantic.indices, len(semantic.dictionary)).to_numpy()
        self._similarity = table["similarity"].to_numpy()
        self._score = table["score"].to_numpy()

    def range(self, user: bytes) -> slice:
        """The rows of a user, empty for an unknown one."""
        ids, ends = self._ids, self._ends
        # bytes compare as Arrow sorts strings: by UTF-8.
        place = bisect_left(self._users, user, key=lambda row: bytes(ids[ends[row] : ends[row + 1]]))
        if place == len(self._users) or ids[ends[place] : ends[place + 1]] != user:
            return slice(0, 0)
        return slice(self._offsets[place], self._offsets[place + 1])

    def blocked(self, rows: slice, now_us: int) -> set[str]:
        live = self._item[rows][self._until_us[rows] > now_us]
        return set(map(self._item_ids.__getitem__, live.tolist()))

    def rows(self, rows: slice) -> list[BlockedItem]:
        return [
            BlockedItem(
                item_id=self._item_ids[self._item[row]],
                reason=self._reasons[self._reason[row]],
                similarity=float(self._similarity[row]),
                score=float(self._score[row]),
                semantic_id=self._semantic_ids[self._semantic[row]],
                expires_at=_EPOCH + timedelta(microseconds=int(self._expires_us[row])),
            )
            for row in range(rows.start, rows.stop)
        ]


class _Version:
    """A verified version in memory; never changed after it was made."""

    def __init__(self, root: str, name: str, manifest: dict[str, Any], digest: str) -> None:
        self.name = name
        self.digest = digest
        self.watermark = _EPOCH + timedelta(microseconds=manifest["about"]["watermark_us"])
        self.published_at = _published_at(manifest)
        entries = {entry["path"]: entry for entry in manifest["files"]}
        self._buckets = [
            _bucket(root, name, entries, bucket_path("data", bucket)) for bucket in range(manifest["buckets"])
        ]

    def blocked(self, user_id: str, now_us: int) -> set[str]:
        """Items blocked for the user at a time."""
        bucket = self._buckets[bucket_of(user_id, len(self._buckets))]
        return bucket.blocked(bucket.range(user_id.encode(errors="surrogatepass")), now_us)

    def rows(self, user_id: str) -> list[BlockedItem]:
        """All rows of the user."""
        bucket = self._buckets[bucket_of(user_id, len(self._buckets))]
        return bucket.rows(bucket.range(user_id.encode(errors="surrogatepass")))


def _open(root: str, pinned: _Version | None) -> _Version:
    """The version that the pointer names: `pinned` itself when it is that one."""
    pointer = versions.read_pointer(root)
    if pointer is None:
        raise ArtefactError(f"{root}: nothing is published (no {versions.POINTER}); run the nightly job first")
    name, digest = pointer["version"], pointer["manifest_sha256"]
    if pinned is not None and (pinned.name, pinned.digest) == (name, digest):
        return pinned
    complete = versions.read_manifest(root, name, digest)
    if complete is None:
        raise ArtefactError(f"{versions.version_url(root, name)}: has no manifest; roll back to another version")
    return _Version(root, name, complete[0], digest)


def _bucket(root: str, name: str, entries: dict[str, Any], path: str) -> _Bucket:
    if path not in entries:
        raise ArtefactError(f"{versions.version_url(root, name)}: names no {path}; roll back to another version")
    data = versions.read_entry(root, name, entries[path])
    try:
        table = check(parquet.read_table(pa.BufferReader(data)), BLOCKLIST, path)
    except (DataError, pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{versions.version_url(root, name)}: damaged: {error}; roll back") from None
    if len(table) != entries[path]["rows"]:
        raise ArtefactError(f"{versions.version_url(root, name)}: damaged: {path} has {len(table)} rows; roll back")
    return _Bucket(table, path)


def _published_at(manifest: dict[str, Any]) -> datetime:
    try:
        return datetime.fromisoformat(manifest["published_at"]).astimezone(UTC)
    except ValueError as error:
        raise ArtefactError(f"manifest of {manifest['version']}: published_at: {error}; roll back") from None
