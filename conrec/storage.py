"""Files behind any fsspec URL: a local path, `memory://`, `s3://`, `gs://`.

    table = read_table("s3://bucket/items.parquet", columns=["item_id", "text"])

Invariant: a file is there whole or not at all. Local files are written beside their target and moved over it
by `os.replace`; object stores get one put, which they make visible at once. What several machines may write is
created exclusively, or replaced only if it is unchanged. Nothing but Parquet, JSON and bytes that the caller made
(safetensors, HTML, PNG) passes through here, and never a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import uuid
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

from conrec.errors import DataError, MissingDependencyError, StorageError
from conrec.location import located
from conrec.store_errors import names_store

BLOCK_BYTES = 1 << 20
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Protocol -> the extra that brings its driver."""
PARTIAL = ".partial"
"""End of the names of files that are being written; a killed process leaves them."""
_CONDITION_FAILED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What mounts answer that make no hard links: FAT, many network shares, object stores behind FUSE."""
_CHANGES = ("etag", "lastmodified", "mtime", "updated", "modificationtime", "modify", "created")
"""What stores call the tag or the time of change of a file, in small letters and joined up."""
_creating = threading.Lock()


@dataclass(frozen=True)
class Snapshot:
    """One file as it was when it was read."""

    url: str
    data: bytes | None
    """None: there was none."""
    tag: str | None
    """What a conditional put compares; None where the store has no such thing, or no file was there."""


@names_store
def filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url` and the path on it (absolute where it is local).

    Raises `MissingDependencyError` where the protocol's fsspec package is not installed, `DataError` as `located`.
    """
    try:
        place = located(url)
        system, path = fsspec.core.url_to_fs(place, **_patience(place))
        return system, str(path)
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0])
        remedy = f'in a checkout, pip install ".[{extra}]"' if extra else "install the fsspec package of this protocol"
        raise MissingDependencyError(f"{url}: {error}; {remedy}") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}; write a local path or a URL such as s3://bucket/folder") from None


def _patience(url: str) -> dict[str, Any]:
    """Options that bound how long S3 is waited for: its client tries 5 times, and s3fs 5 times that, 7 minutes against
    a server that accepts and never answers. Two and a half minutes instead, unless somebody has set it otherwise."""
    chosen = "AWS_MAX_ATTEMPTS" in os.environ or "config_kwargs" in fsspec.config.conf.get("s3", {})
    if chosen or not url.startswith(("s3://", "s3a://")):
        return {}
    return {"config_kwargs": {"retries": {"total_max_attempts": 2}}}


def arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """The same as Arrow and Ray Data take it; local files without the detour through Python."""
    files, path = filesystem(url)
    local = isinstance(files, LocalFileSystem)
    return ArrowLocalFileSystem() if local else PyFileSystem(FSSpecHandler(files)), path


def absolute(url: str) -> str:
    """The same place, independent of the working directory: workers on other machines start elsewhere."""
    place = located(url)
    return os.path.abspath(place) if "://" not in place else place


def join(url: str, *parts: str) -> str:
    """`url/part/part`, whatever slashes the pieces bring."""
    base = str(url)
    base = base if base.endswith("://") else base.rstrip("/")
    tail = "/".join(part.strip("/") for part in parts if part.strip("/"))
    if not tail:
        return base
    return f"{base}{tail}" if base.endswith("://") else f"{base}/{tail}"


@names_store
def exists(url: str) -> bool:
    """Whether a file or folder lies at `url`."""
    files, path = filesystem(url)
    files.invalidate_cache(path)
    return bool(files.exists(path))


@names_store
def read_bytes(url: str) -> bytes:
    """The content of one file. Raises `FileNotFoundError` naming the path."""
    files, path = filesystem(url)
    return bytes(files.cat_file(path))


@names_store
def write_bytes(url: str, data: bytes) -> None:
    """Writes one file, whole or not at all; an older file at `url` is replaced."""
    files, path = filesystem(url)
    if not isinstance(files, LocalFileSystem):
        files.pipe_file(path, data)
        return
    _replace(path, data)


@names_store
def put_file(local: Path, url: str) -> None:
    """Copies one local file as `write_bytes` writes it, in little memory."""
    files, path = filesystem(url)
    if not isinstance(files, LocalFileSystem):
        files.put_file(str(local), path)
        return
    _replace(path, local)


def _replace(path: str, data: bytes | Path) -> None:
    temporary = _write_beside(path, data)
    try:
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@names_store
def create_bytes(url: str, data: bytes) -> None:
    """Writes one file, whole or not at all. Raises `FileExistsError` where there is one: of several writers one wins.

    Holds on local disks, S3, Google Cloud Storage and in memory; fsspec only looks before it writes on other stores. On
    a mount without hard links it holds among machines that share its file locks.
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
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _move_where_none_is(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _move_where_none_is(temporary: str, path: str) -> None:
    """What a link does, on a mount that makes none: all who create in this folder look and move one after another."""
    with _alone(os.path.join(os.path.dirname(path), f".creating{PARTIAL}")):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        os.rename(temporary, path)


@contextlib.contextmanager
def _alone(lock: str) -> Iterator[None]:
    """Holds a lock file, which the kernel gives back however this process ends."""
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # The holder before removes its file: whoever comes next would lock another one of that name.
            if not _is_file_at(lock, handle):
                continue
            try:
                yield
            finally:
                os.unlink(lock)
            return
        finally:
            os.close(handle)


def _is_file_at(path: str, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def require_creation(url: str) -> None:
    """Tries whether the store at the folder `url` takes files, and creates them exclusively: what publishing needs.

    Raises `StorageError`; leaves nothing behind.
    """
    probe = join(url, f".probe-{uuid.uuid4().hex}{PARTIAL}")
    try:
        create_bytes(probe, b"1")
        with contextlib.suppress(FileExistsError):
            create_bytes(probe, b"2")
            remove(probe)
            raise StorageError(
                f"{url}: this store replaces a file that was to be created, so two publishers would overwrite each "
                "other; take a store with conditional writes (If-None-Match), or a local or mounted folder"
            )
        remove(probe)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{url}: nothing can be published here: {error}; mend that, or name another root") from error


def _write_beside(path: str, data: bytes | Path) -> str:
    """Writes a hidden file in the folder of `path`, on disk when this returns, and returns its path.

    `data` is the content, or a local file that has it.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    # In the same folder, since os.replace is atomic only within a file system; hidden, so that a leftover of a
    # killed process is not taken for data.
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=PARTIAL, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            if isinstance(data, Path):
                with data.open("rb") as source:
                    shutil.copyfileobj(source, file, BLOCK_BYTES)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the writer; readers may be other users
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return temporary


@names_store
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
    return _replace_tagged(before.url, before.tag, data)


@names_store
def _replace_tagged(url: str, tag: str | None, data: bytes) -> bool:
    files, path = filesystem(url)
    try:
        if tag is None:
            files.pipe_file(path, data, mode="create")
        else:
            files.pipe_file(path, data, IfMatch=tag)
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


@names_store
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


@names_store
def parquet_metadata(url: str) -> parquet.FileMetaData:
    """The footer of a Parquet file. Raises `DataError`."""
    with _parquet_file(url) as file:
        return file.metadata


@names_store
def read_row_groups(
    url: str, metadata: parquet.FileMetaData, groups: Iterable[int], columns: Iterable[str] | None = None
) -> pa.Table:
    """Some row groups of a Parquet file with this footer, one behind the other. Raises `DataError`."""
    with _parquet_file(url, metadata) as file:
        return file.read_row_groups(list(groups), columns=None if columns is None else list(columns))


@contextlib.contextmanager
def _parquet_file(url: str, metadata: parquet.FileMetaData | None = None) -> Iterator[parquet.ParquetFile]:
    files, path = arrow_filesystem(url)
    try:
        with files.open_input_file(path) as source:
            yield parquet.ParquetFile(source, metadata=metadata, pre_buffer=True)
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder") from None
    except pa.ArrowException as error:
        raise DataError(f"{url}: not readable as Parquet: {error}") from None


def write_table(table: pa.Table, url: str, **options: Any) -> None:
    """Writes one Parquet file; `options` go to `pyarrow.parquet.write_table`."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, **{"compression": "zstd", **options})
    write_bytes(url, sink.getvalue().to_pybytes())


@names_store
def list_files(url: str, hidden: bool = False) -> list[str]:
    """Names, relative to `url` and sorted, of all files below it; hidden ones (`.name`) only if asked."""
    files, path = filesystem(url)
    files.invalidate_cache(path)  # other machines write too
    names = (os.path.relpath(file, path) for file in files.find(path))
    return sorted(name for name in names if hidden or not any(part.startswith(".") for part in name.split("/")))


def is_partial(name: str) -> bool:
    """Whether a file of this name was being written: where nobody writes any more, a killed process left it."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(PARTIAL)


def list_parquet(url: str, hidden: bool = False) -> list[str]:
    """URLs of every `*.parquet` below a folder, in the order of their names: what is read one by one."""
    return [join(url, name) for name in list_files(url, hidden) if name.endswith(".parquet")]


@names_store
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


@names_store
def size(url: str) -> int:
    """Bytes of one file."""
    files, path = filesystem(url)
    return int(files.size(path))


@names_store
def list_folders(url: str) -> list[str]:
    """Names of the folders directly below `url`, sorted; none where there is nothing."""
    files, path = filesystem(url)
    files.invalidate_cache(path)
    if not files.isdir(path):
        return []
    entries = files.ls(path, detail=True)
    return sorted(os.path.basename(entry["name"].rstrip("/")) for entry in entries if entry["type"] == "directory")


@names_store
def stamp(url: str) -> str:
    """Size and time of change (or the store's own tag) of one file: another one where its bytes changed.

    On a store that tells neither it is another one each time.
    """
    files, path = filesystem(url)
    files.invalidate_cache(path)
    facts = files.info(path)
    told = {name.lower().replace("-", "").replace("_", ""): value for name, value in facts.items()}
    changed = [str(told[name]) for name in _CHANGES if told.get(name) is not None]
    return " ".join([str(facts["size"]), *(changed or [uuid.uuid4().hex])])


@names_store
def download(url: str, local_folder: str | Path) -> Path:
    """Copies every file below `url` into `local_folder` and returns it."""
    files, path = filesystem(url)
    target = Path(local_folder)
    for name in list_files(url):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        files.get_file(f"{path.rstrip('/')}/{name}", str(target / name))
    return target


@names_store
def fetch_file(url: str, local: Path) -> None:
    """Copies one file to the local disk, in little memory. Raises `FileNotFoundError` naming the path."""
    files, path = filesystem(url)
    files.get_file(path, str(local))


@names_store
def upload(local_folder: str | Path, url: str) -> None:
    """Copies every file below `local_folder` to `url`, each whole or not at all."""
    for name in list_files(str(local_folder)):
        put_file(Path(local_folder) / name, join(url, name))


@contextlib.contextmanager
def local_folder(url: str) -> Iterator[Path]:
    """The folder at `url` on this machine: itself where it is local, else a temporary copy."""
    files, path = filesystem(url)
    if isinstance(files, LocalFileSystem):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="conrec-") as folder:
        yield download(url, folder)


def remove_marked(url: str, mark: str) -> None:
    """Removes a folder, the file in it that marks it as complete first: what is half removed must not look whole."""
    remove(join(url, mark))
    remove(url)


@names_store
def remove(url: str) -> None:
    """Removes a file or a folder with all it holds; nothing there is fine."""
    files, path = filesystem(url)
    files.invalidate_cache(path)
    if files.exists(path):
        files.rm(path, recursive=True)
