"""What the input tables say, as digests: equal for the same rows, wherever and in whatever files they lie.

    log = LogContent(settings.interactions, "runs/x/inputs/interactions.json")
    log.until(cut_us).digest            # of the events until the cut: what came after it changes nothing
    items_content(read_items(settings.items), "text", "category").digest

A digest is the sum of a 128-bit hash of every row, so it does not depend on the order of rows, on how they are divided
into files, on names of files or columns, or on columns that nobody reads. It is made for noticing changes, not to
withstand somebody who forges one.

Invariant: rows that differ in one value have another digest. Digests of a file of the log are kept in a small JSON
document by its size and time of change: one that did not change is read again only for a moment that divides its rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec import storage
from conrec.config import InteractionSettings
from conrec.errors import DataError
from conrec.feedback.clock import Clock, latest_us
from conrec.feedback.files import InputFile
from conrec.feedback.labels import interaction_files, read_interaction_file
from conrec.hashing import mix, stable_hash
from conrec.ragged import Ragged, places
from conrec.tables import INTERACTIONS

ROWS_AT_ONCE = 1 << 20
_LANES = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1B54A32D192ED03))
_NOTHING_US = -(1 << 62)
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class Content:
    """How many rows, and the sum of their hashes in each of two lanes of 64 bits."""

    rows: int = 0
    sums: tuple[int, int] = (0, 0)

    def __add__(self, other: Content) -> Content:
        sums = [(mine + theirs) & _WORD for mine, theirs in zip(self.sums, other.sums, strict=True)]
        return Content(self.rows + other.rows, (sums[0], sums[1]))

    @property
    def digest(self) -> str:
        """Number of rows and 32 hex digits."""
        return f"{self.rows}-{self.sums[0]:016x}{self.sums[1]:016x}"


def content_of(columns: list[pa.Array | pa.ChunkedArray]) -> Content:
    """The content of a table with these columns, in this order. Shape: (N,) each."""
    total = Content()
    for start in range(0, len(columns[0]), ROWS_AT_ONCE):
        values = [_hashes(column.slice(start, ROWS_AT_ONCE)) for column in columns]
        lanes = []
        for lane in _LANES:
            rows = np.full(len(values[0]), lane)
            for column in values:
                rows = mix(rows ^ column) + lane
            lanes.append(int(rows.sum(dtype=np.uint64)))
        total += Content(len(values[0]), (lanes[0], lanes[1]))
    return total


def events_content(interactions: pa.Table) -> Content:
    """User, item, time and feedback of every event; other columns are not looked at."""
    return content_of([interactions[name] for name in INTERACTIONS.names])


def items_content(items: pa.Table, *columns: str) -> Content:
    """item_id and those of the named columns that the table has."""
    return content_of([items[name] for name in ("item_id", *columns) if name in items.column_names])


def _hashes(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A hash of each value, null among them. Shape: (N,) -> (N,) uint64."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_list(column.type):
        return _list_hashes(column)
    if pa.types.is_timestamp(column.type):
        return mix(column.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64))
    # Each text once: a log names the same users and items over and over.
    coded = pc.dictionary_encode(column, null_encoding="encode")
    texts = coded.dictionary
    hashes = stable_hash(pc.fill_null(texts, ""))
    hashes[np.asarray(pc.is_null(texts))] = _LANES[0]
    return hashes[np.asarray(coded.indices)]


def _list_hashes(column: pa.ListArray) -> np.ndarray:
    """Of lists of float32, by their bits; null is no empty list."""
    empty = np.asarray(column.is_null())
    rows = Ragged.from_arrow(pc.fill_null(column, pa.scalar([], column.type)))
    bits = np.ascontiguousarray(rows.values, np.float32).view(np.uint32).astype(np.uint64)
    place = places(rows.lengths)
    hashed = np.concatenate(
        (np.zeros(1, np.uint64), np.cumsum(mix(bits ^ mix(place.astype(np.uint64))), dtype=np.uint64))
    )
    total = hashed[rows.offsets[1:]] - hashed[rows.offsets[:-1]]
    return np.where(empty, _LANES[1], mix(total ^ rows.lengths.astype(np.uint64)))


class LogContent:
    """The content of the log until any moment. A file is read once for all of it and once for each moment that divides
    its rows, and again only when it changed.

    `cache_url` is the JSON document that remembers; None remembers nothing.
    """

    def __init__(self, settings: InteractionSettings, cache_url: str | None) -> None:
        self._settings, self._cache_url = settings, cache_url
        self._passing: set[str] = set()
        """Keys of files of which rows were left out because they lie ahead of now: tomorrow they may be in it."""

    @cached_property
    def last_us(self) -> int:
        """Time of the last event in microseconds since 1970. Raises `DataError` for a log without events."""
        last = max((entry["last_us"] for entry in self._entries.values()), default=_NOTHING_US)
        if last == _NOTHING_US:
            raise DataError(
                f"{self._settings.path}: the table has no rows; check the path, and rules that exclude everything"
            )
        return int(last)

    def until(self, time_us: int | None = None) -> Content:
        """The content of the events with time <= time_us; None: of all."""
        total = Content()
        for file, entry in self._entries.items():
            if time_us is None or entry["last_us"] <= time_us:
                total += _content(entry["all"])
            elif entry["first_us"] <= time_us:
                if str(time_us) not in entry["until"]:
                    entry["until"][str(time_us)] = _entry(self._read(file), time_us)["all"]
                    self._save(self._entries)
                total += _content(entry["until"][str(time_us)])
        return total

    @cached_property
    def _files(self) -> dict[str, InputFile]:
        """Key -> file. The key holds what decides the labelled rows of a file: the file itself and the settings."""
        labels = self._settings.model_dump_json(include={"columns", "rules", "max_future_share"})
        keys = {}
        for file in interaction_files(self._settings):
            folders = {name: str(value) for name, value in file.folders.items()}
            parts = json.dumps([storage.absolute(file.url), storage.stamp(file.url), folders, labels])
            keys[hashlib.sha256(parts.encode()).hexdigest()] = file
        return keys

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        known, entries, clock = self._load(), dict[str, dict[str, Any]](), Clock(self._settings)
        latest = latest_us(self._settings)
        for key, file in self._files.items():
            # What was counted under a later clock holds events that lie ahead of this one.
            if key in known and known[key]["last_us"] <= latest:
                entries[key] = known[key]
                clock.events += known[key]["all"][0]
                continue
            dropped = clock.dropped
            entries[key] = _entry(read_interaction_file(file, self._settings, clock))
            if clock.dropped > dropped:
                self._passing.add(key)
        clock.check()
        if entries.keys() - known.keys() - self._passing:
            self._save(entries)
        return entries

    def _read(self, key: str) -> Iterator[pa.Table]:
        return read_interaction_file(self._files[key], self._settings, Clock(self._settings))

    def _load(self) -> dict[str, dict[str, Any]]:
        if self._cache_url is None or not storage.exists(self._cache_url):
            return {}
        try:
            known = storage.read_json(self._cache_url)
        except DataError:  # what it remembers can be counted again
            return {}
        return known if isinstance(known, dict) else {}

    def _save(self, entries: dict[str, dict[str, Any]]) -> None:
        if self._cache_url is not None:
            lasting = {key: entry for key, entry in entries.items() if key not in self._passing}
            storage.write_json(self._cache_url, lasting)


def _entry(tables: Iterable[pa.Table], time_us: int | None = None) -> dict[str, Any]:
    first, last, content = _NOTHING_US, _NOTHING_US, Content()
    for table in tables:
        times = table["timestamp"].cast(pa.int64())
        if len(times):
            extremes = pc.min_max(times).as_py()
            first = extremes["min"] if first == _NOTHING_US else min(first, extremes["min"])
            last = max(last, extremes["max"])
        content += events_content(table if time_us is None else table.filter(pc.less_equal(times, time_us)))
    return {"first_us": first, "last_us": last, "all": [content.rows, *content.sums], "until": {}}


def _content(entry: list[int]) -> Content:
    return Content(entry[0], (entry[1], entry[2]))
