"""Makes the flat arrays of conrec/serving/lookup.py from the rows of a version, in memory or in files.

    arrays = in_memory(root, manifest, "data")
    entries = in_files(root, manifest, "data", folder)      # then map_files(folder, entries)
    arrays = in_memory(root, manifest, "data", Shard(3, 16))

Invariant: the arrays are a function of the published rows alone, whether they live in memory or in files. They are
built bucket by bucket, in memory bounded by a bucket and the catalogue. A file is only mapped after its digest was
found right; mapped pages are shared by all processes of a machine, and the kernel may drop them.

Needs pyarrow, fsspec and numpy only.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.errors import ArtefactError
from conrec.hashing import stable_hash
from conrec.ragged import ranges
from conrec.serving import versions
from conrec.serving.lookup import BLOCKED, HASH, ID, ROW, SEPARATOR, UNTIL, WIDTH
from conrec.serving.rows import BLOCKING_REASONS, SCHEMAS, bucket_path, read_bucket, user_offsets
from conrec.serving.shards import Shard

FORMAT = 3
"""Of the arrays; files of another format are compiled anew."""
_TERM = ("reason", "demotes_at", "expires_at")
_BLOCK = 1 << 20
_REMEDY = "roll back to another version"


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


class Files:
    """Arrays that grow in files `<prefix>.<array>` of a folder; `safely`: on disk once they are described."""

    def __init__(self, folder: Path, prefix: str, safely: bool = True) -> None:
        self._folder, self._prefix, self._safely = folder, prefix, safely
        self._open: dict[str, tuple[Any, Any]] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds to the end of the array `name`; the first piece has its type."""
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
        """Closes the files, and describes them."""
        for name, (file, digest) in self._open.items():
            file.flush()
            if self._safely:
                os.fsync(file.fileno())
            file.close()
            self._entries[name]["sha256"] = digest.hexdigest()
        return self._entries


def in_memory(root: str, manifest: dict[str, Any], shape: str, shard: Shard | None = None) -> dict[str, np.ndarray]:
    """The arrays of a version of a store, or of a shard of its users alone.

    Raises `ArtefactError` where a file is damaged.
    """
    sink = _Memory()
    _compile(Rows(root, manifest, shape, shard), sink)
    return sink.arrays()


def in_files(
    root: str, manifest: dict[str, Any], shape: str, folder: Path, shard: Shard | None = None
) -> dict[str, dict[str, Any]]:
    """Writes the same arrays below `folder`; returns file, type, bytes and digest of each by name.

    Raises `ArtefactError` where a file of the store is damaged.
    """
    sink = Files(folder, shape)
    _compile(Rows(root, manifest, shape, shard), sink)
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


def _compile(version: Rows, sink: Sink) -> None:
    buckets = version.manifest["buckets"]
    if version.shard is not None:
        version.shard.require_divides(buckets, versions.version_url(version.root, version.manifest["version"]))
    join(version, (compile_bucket(version, bucket) for bucket in range(buckets)), sink)


@dataclass(frozen=True)
class Rows:
    """The rows of one shape of a version; those of the users of a shard, where one is named."""

    root: str
    manifest: dict[str, Any]
    shape: str
    shard: Shard | None = None

    def read(self, bucket: int) -> pa.Table:
        """Those of a bucket, none of one of another shard. Raises `ArtefactError` where its file is damaged."""
        if self.shard is not None and not self.shard.has(bucket):
            return SCHEMAS[self.shape].empty_table()
        return read_bucket(self.root, self.manifest, bucket_path(self.shape, bucket), self.shape)

    @property
    def texts(self) -> list[str]:
        """Columns of texts that many rows share."""
        fields = SCHEMAS[self.shape]
        return [field.name for field in fields if pa.types.is_string(field.type) and field.name != "user_id"]

    @property
    def terms(self) -> list[str]:
        """Columns whose combinations many rows share."""
        return [name for name in _TERM if name in SCHEMAS[self.shape].names]


@dataclass(frozen=True)
class Bucket:
    """The arrays of one bucket, which count users, rows, bytes, terms and texts from its own first.

    Shape: texts: column -> (D,) large_string, its distinct texts, numbered from 1 as they appear; 0 is null.
    """

    users: int
    rows: int
    arrays: dict[str, np.ndarray]
    texts: dict[str, pa.Array]


def compile_bucket(version: Rows, bucket: int) -> Bucket:
    """The arrays of one bucket of a version, a function of its rows alone.

    Raises `ArtefactError` where a file of the store is damaged.
    """
    table = version.read(bucket)
    url = f"{versions.version_url(version.root, version.manifest['version'])}/{bucket_path(version.shape, bucket)}"

    # 1. Users, sorted by hash.
    names, offsets = user_offsets(table, url)
    hashes = stable_hash(names)
    if (hashes % np.uint64(version.manifest["buckets"]) != bucket).any():
        raise ArtefactError(f"{url}: damaged: a user of another bucket; {_REMEDY}")
    order = np.argsort(hashes, kind="stable")
    ends, user_bytes = _bytes(names.take(pa.array(order)))
    lengths = np.diff(offsets)[order]
    starts = np.cumsum(lengths) - lengths
    records = np.zeros((len(order), WIDTH), np.int64)
    records[:, HASH], records[:, ID], records[:, ROW] = hashes[order].view(np.int64), ends[:-1], starts

    # 2. Their rows, in this order of the users and in the published order within each.
    table = table.take(pa.array(ranges(offsets[:-1][order], lengths)))
    arrays = {"user_bytes": user_bytes}
    if version.shape == "data":
        records[:, BLOCKED], records[:, UNTIL], arrays["blocked_bytes"] = _blocked(table, starts)
    arrays["users"] = records
    codes, texts = {}, {}
    for name in version.texts:
        encoded = table[name].cast(pa.large_string()).combine_chunks().dictionary_encode()
        numbers = pc.fill_null(pc.add(encoded.indices, 1), 0).to_numpy()
        codes[name], texts[name] = numbers.astype(np.uint32), encoded.dictionary
    keys = [codes[name] if name in codes else table[name].cast(pa.int64()).to_numpy() for name in version.terms]
    arrays["term"], distinct = _numbered(keys)
    for name, key in zip(version.terms, keys, strict=True):
        arrays[f"term_{name}"] = key[distinct]
    for field in SCHEMAS[version.shape]:
        if field.name in codes and field.name not in version.terms:
            arrays[field.name] = codes[field.name]
        elif pa.types.is_floating(field.type):
            arrays[field.name] = table[field.name].to_numpy()
    return Bucket(len(order), len(table), arrays, texts)


def join(version: Rows, buckets: Iterable[Bucket], sink: Sink) -> None:
    """Gives a sink the arrays of a version, of those of all its buckets in their order."""
    texts = {name: _Texts() for name in version.texts}
    users = rows = user_bytes = blocked_bytes = terms = 0
    sink.append("bucket_users", np.zeros(1, np.int64))
    for bucket in buckets:
        numbers = {name: text.numbers(bucket.texts[name]) for name, text in texts.items()}
        for name, values in bucket.arrays.items():
            if name == "users":
                # What another process made is read-only.
                records = values.copy()
                records[:, ID] += user_bytes
                records[:, ROW] += rows
                records[:, BLOCKED] += blocked_bytes
                sink.append(name, records.ravel())
            elif name == "term":
                sink.append(name, (values + terms).astype(np.uint32))
            elif (column := name.removeprefix("term_")) in numbers:
                sink.append(name, numbers[column][values])
            else:
                sink.append(name, values)
        users, rows = users + bucket.users, rows + bucket.rows
        user_bytes += len(bucket.arrays["user_bytes"])
        blocked_bytes += len(bucket.arrays.get("blocked_bytes", ()))
        terms += len(bucket.arrays[f"term_{version.terms[0]}"])
        sink.append("bucket_users", np.array([users], np.int64))
    end = np.zeros(WIDTH, np.int64)
    end[[ID, ROW, BLOCKED]] = user_bytes, rows, blocked_bytes
    sink.append("users", end)
    for name, text in texts.items():
        ends, data = _bytes(text.values)
        sink.append(f"{name}_ends", ends)
        sink.append(f"{name}_bytes", data)


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
    until[pc.match_substring(items, SEPARATOR).to_numpy(zero_copy_only=False)] = np.iinfo(np.int64).min
    separated = (pa.scalar(part, pa.large_string()) for part in ("", SEPARATOR))
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
    """Distinct texts of a column over buckets, numbered from 1 as they appear; 0 is null."""

    def __init__(self) -> None:
        self.values = pa.array([], pa.large_string())

    def numbers(self, texts: pa.Array) -> np.ndarray:
        """The numbers here of a bucket's own from 0. Shape: texts (D,) large_string, distinct -> (D + 1,) uint32."""
        known = pc.index_in(texts, value_set=self.values)
        self.values = pa.concat_arrays([self.values, texts.filter(pc.is_null(known))])
        numbers = pc.index_in(texts, value_set=self.values).to_numpy().astype(np.uint32) + np.uint32(1)
        return np.concatenate([np.zeros(1, np.uint32), numbers])
