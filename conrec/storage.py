"""Files behind any fsspec URL: a local path, `memory://`, `s3://`, `gs://`.

    table = read_table("s3://bucket/items.parquet", columns=["item_id", "text"])

Invariant: a file is there whole or not at all. Local files are written beside their target and moved over it
by `os.replace`; object stores get one put, which they make visible at once. What several machines may write is
created exclusively, or replaced only if it is unchanged. Nothing but Parquet, JSON and bytes that the caller made
(safetensors, HTML, PNG) passes through here, and never a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as dataset
import pyarrow.parquet as parquet
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocalFileSystem

from conrec.errors import DataError, MissingDependencyError

BLOCK_BYTES = 1 << 20
PARTIAL = ".partial"
"""End of the names of files that are being written; a killed process leaves them."""
_CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_creating = threading.Lock()


@dataclass(frozen=True)
class Snapshot:
    """One file as it was when it was read."""

    url: str
    data: bytes | None
    """None: there was none."""
    tag: str | None
    """What a conditional put compares; None where the store has no such thing, or no file was there."""


def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url` and the path on it (absolute where it is local).

    Raises `MissingDependencyError` where the protocol's fsspec package is not installed.
    """
    try:
        return fsspec.core.url_to_fs(str(url))
    except ImportError as error:
        raise MissingDependencyError(f"{url}: {error}; install the fsspec package of this protocol") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}; write a local path or a URL such as s3://bucket/folder") from None


def arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """The same as Arrow and Ray Data take it; local files without the detour through Python."""
    files, path = filesystem(url)
    local = isinstance(files, LocalFileSystem)
    return ArrowLocalFileSystem() if local else PyFileSystem(FSSpecHandler(files)), path


def absolute(url: str) -> str:
    """The same place, independent of the working directory: workers on other machines start elsewhere."""
    return os.path.abspath(url) if "://" not in str(url) else str(url)


def join(url: str, *parts: str) -> str:
    """`url/part/part`, whatever slashes the pieces bring."""
    base = str(url)
    base = base if base.endswith("://") else base.rstrip("/")
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if not tail:
        return base
    return f"{base}{tail}" if base.endswith("://") else f"{base}/{tail}"


def exists(url: str) -> bool:
    """Whether a file or folder lies at `url`."""
    files, path = filesystem(url)
    files.invalidate_cache(path)
    return bool(files.exists(path))


def read_bytes(url: str) -> bytes:
    """The content of one file. Raises `FileNotFoundError` naming the path."""
    files, path = filesystem(url)
    return bytes(files.cat_file(path))


def write_bytes(url: str, data: bytes) -> None:
    """Writes one file, whole or not at all; an older file at `url` is replaced."""
    files, path = filesystem(url)
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, data)
        return
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def create_bytes(url: str, data: bytes) -> None:
    """Writes one file, whole or not at all. Raises `FileExistsError` where there is one: of several writers one wins.

    Holds on local disks, S3, Google Cloud Storage and in memory; fsspec only looks before it writes on other stores.
    """
    files, path = filesystem(url)
    if not isinstance(files, LocalFileSystem):
        with _creating:  # memory:// looks, then writes; all its writers are in this process
            files.pipe_file(path, data, mode="create")
        return
    temporary = _write_beside(path, data)
    try:
        # A file opened with "x" exists before it is whole; a link to a whole one appears at once, or not at all.
        os.link(temporary, path)
    finally:
        os.unlink(temporary)


def _write_beside(path: str, data: bytes) -> str:
    """Writes a hidden file in the folder of `path`, on disk when this returns, and returns its path."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # In the same folder, since os.replace is atomic only within a file system; hidden, so that a leftover of a
    # killed process is not taken for data.
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=PARTIAL, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the writer; readers may be other users
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


def snapshot(url: str) -> Snapshot:
    """Reads a file that `replace_unchanged` may replace."""
    files, path = filesystem(url)
    try:
        # The tag first: should the file change in between, the tag is the older one, and no put will match it.
        tag = files.info(path, refresh=True)["ETag"] if has_conditional_put(url) else None
        return Snapshot(url, bytes(files.cat_file(path)), tag)
    except FileNotFoundError:
        return Snapshot(url, None, None)


def has_conditional_put(url: str) -> bool:
    """Whether the store itself compares before it replaces: S3. gcsfs can only create conditionally."""
    protocol = filesystem(url)[0].protocol
    return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)


def replace_unchanged(before: Snapshot, data: bytes) -> bool:
    """Replaces a file if it still is what `before` says, in one step of the store; returns whether it did.

    Only where `has_conditional_put`. After an answer that was lost on the way it may be replaced and False returned.
    """
    files, path = filesystem(before.url)
    try:
        if before.tag is None:
            files.pipe_file(path, data, mode="create")
        else:
            files.pipe_file(path, data, IfMatch=before.tag)
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError as error:
        if getattr(error.__cause__, "response", {}).get("Error", {}).get("Code") not in _CONDITION_FAILED:
            raise
        return False
    return True


def read_json(url: str) -> Any:
    """A JSON document. Raises `DataError` where the file is not valid JSON."""
    try:
        return json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url}: not valid JSON ({error}); delete it and run the stage that writes it again") from None


def write_json(url: str, document: Any) -> None:
    """Writes a JSON document, indented, keys in the order given; NaN is refused, since JSON has none."""
    write_bytes(url, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_table(url: str, columns: Iterable[str] | None = None) -> pa.Table:
    """A Parquet file of ours, or all `*.parquet` of a folder (recursively, in the order of their names) as one table.

    Tables that others wrote are read by `conrec.feedback.files`, which passes no file over.

    Raises `DataError` naming the place where there is nothing, a file is not Parquet, or a column is missing.
    """
    files, path = filesystem(url)
    if files.isdir(path):
        paths = [f"{path.rstrip('/')}/{name}" for name in list_files(url) if name.endswith(".parquet")]
        if not paths:
            raise DataError(f"{url}: the folder holds no *.parquet file; name the folder that does")
    elif files.exists(path):
        paths = [path]
    else:
        raise DataError(f"{url}: no such file or folder")
    wanted = None if columns is None else list(columns)
    try:
        source = dataset.dataset(paths, format="parquet", filesystem=arrow_filesystem(url)[0])
        missing = [name for name in wanted or [] if name not in source.schema.names]
        if missing:
            raise DataError(
                f"{url}: column {missing[0]!r} is missing; the columns are {', '.join(source.schema.names)}"
            )
        return source.to_table(columns=wanted)
    except pa.ArrowException as error:
        raise DataError(f"{url}: not readable as Parquet: {error}") from None


def write_table(table: pa.Table, url: str, **options: Any) -> None:
    """Writes one Parquet file; `options` go to `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **{"compression": "zstd", **options})
    write_bytes(url, sink.getvalue().to_pybytes())


def list_files(url: str, hidden: bool = False) -> list[str]:
    """Names, relative to `url` and sorted, of all files below it; hidden ones (`.name`) only if asked."""
    files, path = filesystem(url)
    files.invalidate_cache(path)  # other machines write too
    names = (os.path.relpath(found, path) for found in files.find(path))
    return sorted(name for name in names if hidden or not any(part.startswith(".") for part in name.split("/")))


def sha256(url: str) -> str:
    """Hex digest of a file, or of the names and digests of all files of a folder.

    Raises `DataError` where there is nothing.
    """
    files, path = filesystem(url)
    if files.isdir(path):
        lines = (f"{sha256(join(url, name))}  {name}\n" for name in list_files(url))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    if not files.exists(path):
        raise DataError(f"{url}: no such file or folder")
    digest = hashlib.sha256()
    with files.open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def size(url: str) -> int:
    """Bytes of one file."""
    files, path = filesystem(url)
    return int(files.size(path))


def download(url: str, local_folder: str | Path) -> Path:
    """Copies every file below `url` into `local_folder` and returns it."""
    files, path = filesystem(url)
    target = Path(local_folder)
    for name in list_files(url):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{path.rstrip('/')}/{name}", str(target / name))
    return target


def upload(local_folder: str | Path, url: str) -> None:
    """Copies every file below `local_folder` to `url`, each whole or not at all."""
    files, path = filesystem(url)
    for name in list_files(str(local_folder)):
        source = Path(local_folder) / name
        if isinstance(files, LocalFileSystem):
            write_bytes(join(url, name), source.read_bytes())
        else:
            files.put_file(str(source), f"{path.rstrip('/')}/{name}")


@contextlib.contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """The folder at `url` on this machine: itself where it is local, else a temporary copy."""
    files, path = filesystem(url)
    if isinstance(files, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="conrec-") as folder:
        yield download(url, folder)


def remove(url: str) -> None:
    """Removes a file or a folder with all it holds; nothing there is fine."""
    files, path = filesystem(url)
    files.invalidate_cache(path)
    if files.exists(path):
        files.rm(path, recursive=True)
