"""The rows of a version as flat arrays, laid out for the question of a request: which rows does this user have?

    arrays = in_memory(root, manifest, "data")       # or in_files(..., folder), then mapped by `map_files`
    rows = Compiled(arrays).rows("alice")            # a slice; arrays["item_id"][rows], ...

A request costs what it touches: every place of memory that nobody asked for lately takes longer than the work on it.
So users stand in the order of (bucket, hash), a small index over the first bits of the hash leads to one or two of
them, and what is known of one is one record. The ids of the items that a user's rows block are also there as one piece
of text, which a request splits: quicker than looking up thirty texts. Only where a row of the user has ended does it
read the rows themselves. In those text is a number, and so are reason and times together, which few rows differ in.

Invariant: the arrays are a function of the published rows alone, whether they live in memory or in files. They are
built bucket by bucket, in memory bounded by a bucket and the catalogue. A file is only mapped after its digest was
found right; mapped pages are shared by all processes of a machine, and the kernel may drop them.

Needs pyarrow, fsspec and numpy only.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec.errors import ArtefactError, DataError
from conrec.hashing import stable_hash, stable_hash_of
from conrec.ragged import ranges
from conrec.store import versions
from conrec.store.buckets import bucket_path
from conrec.tables import BLOCKLIST, RULES, check

SCHEMAS = {"data": BLOCKLIST, "rules": RULES}
"""Shape of the published rows -> their columns."""
_FORMER_NAMES = {2: {"theta": "threshold"}}
"""Schema version of a manifest -> columns that had another name then."""
FORMAT = 3
"""Of the arrays; files of another format are compiled anew."""
BLOCKING_REASONS = ("explicit", "predicted")
"""Rows with any other reason, of a later release say, do nothing."""
_TERM = ("reason", "demotes_at", "expires_at")
_BLOCK = 1 << 20
_SEPARATOR = "\x1f"
"""Behind the id of each blocked item; a user with an id that holds it is answered from the rows."""
_HASH, _ID, _ROW, _BLOCKED, _UNTIL = _FIELDS = range(5)
"""Of a user's record: the hash, where the id, the rows and the text of blocked items begin (they end where those of the
next user do), and the moment from which that text no longer holds, microseconds."""
_WIDTH = len(_FIELDS)
_HASH_BITS = 64
_REMEDY = "roll back to another version"

Arrays = Mapping[str, np.ndarray]


class Sink(Protocol):
    """Where arrays grow piece by piece."""

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds to the end of the array `name`; all pieces of one array have one type."""


class _Memory:
    def __init__(self) -> None:
        self._pieces: dict[str, list[np.ndarray]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        self._pieces.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, np.ndarray]:
        # One array after the other, so that no more than one of them is there twice.
        return {name: np.concatenate(self._pieces.pop(name)) for name in list(self._pieces)}


class _Files:
    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._open: dict[str, tuple[Any, Any]] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        if name not in self._open:
            file = f"{self._prefix}.{name}"
            self._open[name] = ((self._folder / file).open("xb"), hashlib.sha256())
            self._entries[name] = {"file": file, "type": values.dtype.str, "bytes": 0}
        file, digest = self._open[name]
        data = np.ascontiguousarray(values).view(np.uint8).data
        file.write(data)
        digest.update(data)
        self._entries[name]["bytes"] += len(data)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Closes the files, safely on disk, and describes them."""
        for name, (file, digest) in self._open.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._entries[name]["sha256"] = digest.hexdigest()
        return self._entries


def in_memory(root: str, manifest: dict[str, Any], shape: str) -> dict[str, np.ndarray]:
    """The arrays of a version of a store. Raises `ArtefactError` where a file is damaged."""
    sink = _Memory()
    _compile(root, manifest, shape, sink)
    return sink.arrays()


def in_files(root: str, manifest: dict[str, Any], shape: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Writes the arrays of a version of a store below `folder`; returns file, type, bytes and digest of each by name.

    Raises `ArtefactError` where a file of the store is damaged.
    """
    sink = _Files(folder, shape)
    _compile(root, manifest, shape, sink)
    return sink.entries()


def map_files(folder: Path, entries: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """Verifies files that `in_files` wrote and maps them, read-only.

    Raises `ArtefactError` naming the file whose size or digest is another, `FileNotFoundError` for one that is gone.
    """
    # Hashing releases the interpreter, so two cores halve the time of opening.
    with ThreadPoolExecutor(2) as threads:
        mapped = threads.map(lambda entry: _mapped(folder, entry), entries.values())
        return dict(zip(entries, mapped, strict=True))


def _mapped(folder: Path, entry: dict[str, Any]) -> np.ndarray:
    remedy = "delete the mirror's folder and mirror again"
    path = folder / entry["file"]
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise ArtefactError(f"{path}: damaged: {size} bytes, not {entry['bytes']}; {remedy}")
        # Read, not mapped: pages that are only looked at once do not become this process's memory.
        digest, block = hashlib.sha256(), memoryview(bytearray(min(size, _BLOCK)))
        while size and (count := file.readinto(block)):
            digest.update(block[:count])
        if digest.hexdigest() != entry["sha256"]:
            raise ArtefactError(f"{path}: damaged: SHA-256 {digest.hexdigest()}, not {entry['sha256']}; {remedy}")
        if size == 0:
            return np.empty(0, entry["type"])
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), entry["type"])


def _compile(root: str, manifest: dict[str, Any], shape: str, sink: Sink) -> None:
    schema = SCHEMAS[shape]
    terms = [name for name in _TERM if name in schema.names]
    texts = {field.name: _Texts() for field in schema if pa.types.is_string(field.type) and field.name != "user_id"}
    users = rows = user_bytes = blocked_bytes = term_count = 0
    sink.append("bucket_users", np.zeros(1, np.int64))
    for bucket in range(manifest["buckets"]):
        path = bucket_path(shape, bucket)
        table = read_bucket(root, manifest, path, shape)
        url = versions.version_url(root, manifest["version"])

        # 1. Users, sorted by hash.
        names, offsets = user_offsets(table, f"{url}/{path}")
        hashes = stable_hash(names)
        if (hashes % np.uint64(manifest["buckets"]) != bucket).any():
            raise ArtefactError(f"{url}/{path}: damaged: a user of another bucket; {_REMEDY}")
        order = np.argsort(hashes, kind="stable")
        names = names.take(pa.array(order))
        ends, data = _bytes(names)
        lengths = np.diff(offsets)[order]
        starts = np.cumsum(lengths) - lengths
        sink.append("user_bytes", data)

        # 2. Their rows, in this order of the users and in the published order within each.
        table = table.take(pa.array(ranges(offsets[:-1][order], lengths)))
        records = np.zeros((len(names), _WIDTH), np.int64)
        records[:, _HASH] = hashes[order].view(np.int64)
        records[:, _ID] = ends[:-1] + user_bytes
        records[:, _ROW] = starts + rows
        if shape == "data":
            records[:, _BLOCKED], records[:, _UNTIL], data = _blocked(table, starts)
            records[:, _BLOCKED] += blocked_bytes
            sink.append("blocked_bytes", data)
            blocked_bytes += len(data)
        sink.append("users", records.ravel())
        codes = {name: text.encode(table[name]) for name, text in texts.items()}
        keys = [codes[name] if name in codes else table[name].cast(pa.int64()).to_numpy() for name in terms]
        numbers, distinct = _numbered(keys)
        sink.append("term", (numbers + term_count).astype(np.uint32))
        for name, key in zip(terms, keys, strict=True):
            sink.append(f"term_{name}", key[distinct])
        for field in schema:
            if field.name in codes and field.name not in terms:
                sink.append(field.name, codes[field.name])
            elif pa.types.is_floating(field.type):
                sink.append(field.name, table[field.name].to_numpy())

        users, rows, user_bytes = users + len(names), rows + len(table), user_bytes + int(ends[-1])
        term_count += len(distinct)
        sink.append("bucket_users", np.array([users], np.int64))
    end = np.zeros(_WIDTH, np.int64)
    end[[_ID, _ROW, _BLOCKED]] = user_bytes, rows, blocked_bytes
    sink.append("users", end)
    for name, text in texts.items():
        ends, data = _bytes(text.values)
        sink.append(f"{name}_ends", ends)
        sink.append(f"{name}_bytes", data)


def read_bucket(root: str, manifest: dict[str, Any], path: str, shape: str) -> pa.Table:
    """The rows of one file of a version, verified, in the columns of today whatever schema it was published with.

    Raises `ArtefactError` where it is missing or damaged.
    """
    url = versions.version_url(root, manifest["version"])
    entry = next((entry for entry in manifest["files"] if entry["path"] == path), None)
    if entry is None:
        raise ArtefactError(f"{url}: names no {path}; {_REMEDY}")
    data = versions.read_entry(root, manifest["version"], entry)
    former = _FORMER_NAMES.get(manifest["schema_version"], {})
    try:
        table = parquet.read_table(pa.BufferReader(data))
        table = table.rename_columns([former.get(name, name) for name in table.column_names])
        table = check(table, SCHEMAS[shape], path)
    except (DataError, pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{url}: damaged: {error}; {_REMEDY}") from None
    if len(table) != entry["rows"]:
        raise ArtefactError(f"{url}: damaged: {path} has {len(table)} rows; {_REMEDY}")
    return table


def user_offsets(table: pa.Table, source: str) -> tuple[pa.Array, np.ndarray]:
    """The distinct users, in their order, and where the rows of each begin; `source` names the file in messages.

    Shape: returns (U,) large_string and (U + 1,) int64. Raises `ArtefactError` when the users do not ascend.
    """
    column = table["user_id"].cast(pa.large_string()).combine_chunks()
    last = max(0, len(column) - 1)
    starts = pc.not_equal(column.slice(min(1, len(column))), column.slice(0, last)).to_numpy(zero_copy_only=False)
    first = np.concatenate(([0], np.flatnonzero(starts) + 1)).astype(np.int64)[: len(column)]
    distinct = column.take(pa.array(first))
    last = max(0, len(distinct) - 1)
    if not pc.all(pc.less(distinct.slice(0, last), distinct.slice(min(1, len(distinct)))), min_count=0).as_py():
        raise ArtefactError(f"{source}: damaged: users are not ascending; {_REMEDY}")
    return distinct, np.append(first, len(column))


def _blocked(table: pa.Table, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of the items that the rows of each user block, as text, and the first moment at which one of them ends.

    Shape: starts (U,) first rows; returns where the text of each user begins (U,) and that moment (U,), both int64, and
    the text (bytes,) uint8.
    """
    if not len(starts):
        return starts, starts, np.zeros(0, np.uint8)
    items = table["item_id"].cast(pa.large_string()).combine_chunks()
    blocking = pc.is_in(table["reason"], pa.array(BLOCKING_REASONS)).to_numpy()
    until = np.where(blocking, table["demotes_at"].cast(pa.int64()).to_numpy(), np.iinfo(np.int64).max)
    until[pc.match_substring(items, _SEPARATOR).to_numpy(zero_copy_only=False)] = np.iinfo(np.int64).min
    separated = (pa.scalar(part, pa.large_string()) for part in ("", _SEPARATOR))
    ends, data = _bytes(pc.binary_join_element_wise(items.filter(pa.array(blocking)), *separated))
    before = np.concatenate(([0], np.cumsum(blocking)))
    return ends[before[starts]], np.minimum.reduceat(until, starts), data


def _bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 of all texts in a row, and where each ends, behind a 0.

    Shape: texts (N,) large_string; returns (N + 1,) int64 and (bytes,) uint8.
    """
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
    return ends - ends[0], data


def _numbered(keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's combination of keys, counted as they appear, and a row that has each.

    Shape: keys of (N,) integers; returns (N,) int64 and (D,) int64.
    """
    numbers = np.zeros(len(keys[0]), np.int64)
    for key in keys:
        encoded = pa.array(key).dictionary_encode()
        numbers = numbers * max(1, len(encoded.dictionary)) + encoded.indices.to_numpy()
        numbers = pa.array(numbers).dictionary_encode().indices.to_numpy().astype(np.int64)
    firsts = np.zeros(int(numbers.max(initial=-1)) + 1, np.int64)
    firsts[numbers[::-1]] = np.arange(len(numbers))[::-1]
    return numbers, firsts


class _Texts:
    """Distinct texts of a column, numbered from 1 as they appear; 0 is null."""

    def __init__(self) -> None:
        self.values = pa.array([], pa.large_string())

    def encode(self, column: pa.ChunkedArray) -> np.ndarray:
        """Shape: column (N,) string; returns (N,) uint32."""
        encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
        known = pc.index_in(encoded.dictionary, value_set=self.values)
        self.values = pa.concat_arrays([self.values, encoded.dictionary.filter(pc.is_null(known))])
        numbers = pc.index_in(encoded.dictionary, value_set=self.values).to_numpy().astype(np.uint32) + np.uint32(1)
        return np.append(numbers, np.uint32(0))[pc.fill_null(encoded.indices, len(numbers)).to_numpy()]


class Compiled:
    """Arrays of one version, ready to be asked by any number of threads. Never changed."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        # Single numbers are read several times faster from a memoryview than from an array.
        self._users = arrays["users"].data
        self._ids = arrays["user_bytes"].data
        self._blocked = arrays.get("blocked_bytes", np.zeros(0, np.uint8)).data
        records = arrays["users"].reshape(-1, _WIDTH)
        self._longest = int(np.diff(records[:, _ID]).max(initial=0))
        self._buckets = len(arrays["bucket_users"]) - 1
        self._shift, slots = _index(arrays["bucket_users"], records[:-1, _HASH])
        self._slots = slots.data
        self._texts = {
            name.removesuffix("_ends"): Texts(arrays, name.removesuffix("_ends"))
            for name in arrays
            if name.endswith("_ends")
        }
        self._blocking: np.ndarray | None = None
        if "term_reason" in arrays:
            reasons = self._texts["reason"].take(list(range(len(self._texts["reason"]))))
            blocking = np.array([reason in BLOCKING_REASONS for reason in reasons], bool)
            # Where every reason blocks, which is the rule, a request need not look at reasons.
            self._blocking = None if blocking[1:].all() else blocking

    @property
    def users(self) -> int:
        """Users with rows."""
        return len(self._users) // _WIDTH - 1

    def rows(self, user_id: str) -> slice:
        """The rows of a user, empty for an unknown one."""
        record = self._record(user_id)
        if record is None:
            return slice(0, 0)
        return slice(self._users[record + _ROW], self._users[record + _WIDTH + _ROW])

    def blocked(self, user_id: str, now_us: int) -> Set[str | None]:
        """The items that are blocked for a user; none for an unknown one. Of the shape `data` only."""
        record = self._record(user_id)
        if record is None:
            return set()
        users = self._users
        if now_us >= users[record + _UNTIL]:
            rows = slice(users[record + _ROW], users[record + _WIDTH + _ROW])
            live = self.live(rows, "demotes_at", now_us)
            return set(self.text("item_id").take(self.arrays["item_id"][live].tolist()))
        begin, end = users[record + _BLOCKED], users[record + _WIDTH + _BLOCKED]
        if begin == end:
            return set()
        return set(str(self._blocked[begin : end - 1], "utf-8").split(_SEPARATOR))

    def _record(self, user_id: str) -> int | None:
        """Where the record of a user begins."""
        user = user_id.encode(errors="surrogatepass")
        if len(user) > self._longest:
            return None  # before the hash, which takes its time for an id of megabytes
        value = stable_hash_of(user_id)
        slot = (value % self._buckets << _HASH_BITS - self._shift) + (value >> self._shift)
        signed = value - (value >> _HASH_BITS - 1 << _HASH_BITS)
        users = self._users
        for record in range(self._slots[slot], self._slots[slot + 1], _WIDTH):
            if users[record] == signed and self._ids[users[record + _ID] : users[record + _WIDTH + _ID]] == user:
                return record
        return None

    def live(self, rows: slice, until: str, now_us: int) -> np.ndarray:
        """Those of the rows that act: their time `until`, a column, is later than now. Shape: (R,) int64 positions."""
        terms = self.arrays["term"][rows]
        acts = self.arrays[f"term_{until}"][terms] > now_us
        if self._blocking is not None:
            acts &= self._blocking[self.arrays["term_reason"][terms]]
        return acts.nonzero()[0] + rows.start

    def text(self, column: str) -> Texts:
        """The texts that the numbers of a column stand for."""
        return self._texts[column]


def _index(bucket_users: np.ndarray, hashes: np.ndarray) -> tuple[int, np.ndarray]:
    """Where the users of each bucket begin whose hash begins with each possible row of bits, some two users a place.

    Shape: bucket_users (B + 1,), hashes (U,) int64, ascending in each bucket as uint64; returns how many bits of a hash
    are left out, and record positions (B * places + 1,) int64.
    """
    buckets = len(bucket_users) - 1
    bits = max(0, int(np.diff(bucket_users).max(initial=0) // 2).bit_length())
    shift = _HASH_BITS - bits
    firsts = np.arange(1 << bits, dtype=np.uint64) << np.uint64(shift) if bits else np.zeros(1, np.uint64)
    slots = np.empty((buckets << bits) + 1, np.int64)
    slots[-1] = bucket_users[-1]
    for bucket, (begin, end) in enumerate(itertools.pairwise(bucket_users)):
        here = np.ascontiguousarray(hashes[begin:end]).view(np.uint64)
        slots[bucket << bits : bucket + 1 << bits] = begin + np.searchsorted(here, firsts)
    return shift, slots * _WIDTH


class Texts:
    """Texts by number, decoded when they are first asked for and then kept; 0 is None."""

    def __init__(self, arrays: Arrays, column: str) -> None:
        self._ends = arrays[f"{column}_ends"].data
        self._data = arrays[f"{column}_bytes"].data
        self._kept: list[str | None] = [None] * len(self._ends)

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, numbers: list[int]) -> list[str | None]:
        """The texts of some numbers."""
        texts = list(map(self._kept.__getitem__, numbers))
        if None in texts:
            # Threads that decode the same text at once write equal ones.
            for place in [place for place, text in enumerate(texts) if text is None and numbers[place]]:
                number = numbers[place]
                text = bytes(self._data[self._ends[number - 1] : self._ends[number]]).decode()
                texts[place] = self._kept[number] = text
        return texts
