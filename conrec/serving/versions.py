"""Where published versions lie, and how they are read. The pointers are the only objects that change.

    <root>/versions/<version>/data/*.parquet, rules/*.parquet    written once
    <root>/versions/<version>/compiled.zst                       the same rows as mirrors open them; may be missing
    <root>/versions/<version>/manifest.json                      created last, exclusively: the version is whole
    <root>/CURRENT.json, SHADOW.json                             each names a version and the digest of its manifest

Invariant: bytes are only handed out when size and SHA-256 agree with the manifest, and a manifest only when its digest
agrees with the pointer. Needs no more than pyarrow, fsspec and numpy, since serving reads through it; what writes is
conrec/store/pointers.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeGuard, TypeVar

from conrec import storage
from conrec.errors import ArtefactError

SCHEMA_VERSION = 3
"""Of the manifest and the tables."""
OLDEST_SCHEMA = 2
"""The oldest that is read: readers of a new release are in place first, publishers follow, and both may go back. What
columns were called by then stands in conrec/serving/rows.py."""
T = TypeVar("T")
Pointer = Literal["current", "shadow"]
POINTERS: dict[Pointer, str] = {"current": "CURRENT.json", "shadow": "SHADOW.json"}
"""What serving reads, and what it may read beside that to log the difference."""
MANIFEST = "manifest.json"
COMPILED = "compiled.zst"
"""What mirrors download, conrec/serving/packed.py; a version whose manifest has no `compiled` lacks it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"(data|rules)/[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LISTED = 10
"""Versions that a message names at most."""
_MAX_WATERMARK_US = 253_402_300_799_999_999
"""The end of the year 9999, the last that datetime knows."""
_REMEDY = "roll back to another version, or delete this one and publish again"


def version_url(root: str, version: str) -> str:
    """Folder of a version. Raises `ArtefactError` for a name that could lead elsewhere."""
    if not _is_name(version):
        raise ArtefactError(
            f"{str(version)[:80]!r} is not the name of a version; use letters, digits, dot, dash and underscore, "
            "at most 128"
        )
    return storage.join(root, "versions", version)


def pointer_url(root: str, pointer: Pointer = "current") -> str:
    """The file of a pointer."""
    return storage.join(root, POINTERS[pointer])


def read_pointer(root: str, pointer: Pointer = "current") -> dict[str, Any] | None:
    """The pointer, or None when nothing was ever published. Raises `ArtefactError` when it is damaged."""
    url = pointer_url(root, pointer)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    return parse_pointer(url, data)


def following(root: str, pointer: Pointer, opened: Callable[[dict[str, Any]], T]) -> T:
    """`opened` of what the pointer names; once more where it fails and the pointer was moved meanwhile: what it named
    may be gone by then.

    Raises `ArtefactError` when nothing was ever published, or what the pointer names cannot be opened.
    """
    while True:
        named = require_pointer(root, pointer)
        try:
            return opened(named)
        except ArtefactError:
            if read_pointer(root, pointer) == named:
                raise


def require_pointer(root: str, pointer: Pointer = "current") -> dict[str, Any]:
    """The pointer. Raises `ArtefactError` when nothing was ever published, or it is damaged."""
    named = read_pointer(root, pointer)
    if named is None:
        raise ArtefactError(f"{root}: nothing is published (no {POINTERS[pointer]}); run the nightly job first")
    return named


def pointed_manifest(root: str, named: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the version that a pointer names. Raises `ArtefactError` when it is missing or damaged."""
    complete = read_manifest(root, named["version"], named["manifest_sha256"])
    if complete is None:
        url = version_url(root, named["version"])
        raise ArtefactError(f"{url}: has no manifest; roll back to another version")
    return complete[0]


def complete_manifest(root: str, version: str, sha256: str | None = None) -> tuple[dict[str, Any], str]:
    """`read_manifest` of a version that somebody names.

    Raises `ArtefactError` where it has none, with the newest that have one.
    """
    complete = read_manifest(root, version, sha256)
    if complete is None:
        listed = ", ".join(_newest_first(root)[:_LISTED]) or "none"
        raise ArtefactError(f"{version_url(root, version)}: no complete version; there is: {listed}")
    return complete


def _newest_first(root: str) -> list[str]:
    """Names of the complete versions that can be read."""
    found = [manifest for manifest, _ in read_manifests(root)]
    found.sort(key=lambda manifest: datetime.fromisoformat(manifest["published_at"]), reverse=True)
    return [manifest["version"] for manifest in found]


def read_manifests(root: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Manifest and digest of every complete version that can be read, by name."""
    for name in version_names(root):
        try:
            complete = read_manifest(root, name)
        except ArtefactError:
            continue
        if complete is not None:
            yield complete


def version_names(root: str) -> list[str]:
    """Names of the folders below versions/, complete or not, sorted; what is no name is left out."""
    names = {path.split("/")[0] for path in storage.list_files(storage.join(root, "versions")) if "/" in path}
    return sorted(filter(_is_name, names))


def read_manifest(root: str, version: str, sha256: str | None = None) -> tuple[dict[str, Any], str] | None:
    """The manifest of a version and its SHA-256, or None when the version has none: it never was complete.

    Raises `ArtefactError` when its digest is not `sha256`, it is damaged, or of a schema that this release cannot read.
    """
    url = storage.join(version_url(root, version), MANIFEST)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise _damaged(url, f"SHA-256 {digest}, the pointer says {sha256}", _REMEDY)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(url, f"not JSON: {error}", _REMEDY) from None
    if not isinstance(manifest, dict) or manifest.get("version") != version:
        raise _damaged(url, f"it does not name version {version}", _REMEDY)
    schema_version = manifest.get("schema_version")
    if not _is_count(schema_version):
        raise _damaged(url, "it has no schema version", _REMEDY)
    if not OLDEST_SCHEMA <= schema_version <= SCHEMA_VERSION:
        remedy = "install a newer conrec" if schema_version > SCHEMA_VERSION else "publish again"
        raise ArtefactError(
            f"{url}: schema version {schema_version}, this release reads {OLDEST_SCHEMA} to {SCHEMA_VERSION}; {remedy}"
        )
    if not _is_complete(manifest):
        raise _damaged(url, "fields are missing", _REMEDY)
    return manifest, digest


def read_entry(root: str, version: str, entry: dict[str, Any]) -> bytes:
    """The bytes of one file of a version. Raises `ArtefactError` unless they are what the manifest says."""
    url = storage.join(version_url(root, version), entry["path"])
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise _damaged(url, "the file is missing", _REMEDY) from None
    _require(url, len(data), hashlib.sha256(data).hexdigest(), entry)
    return data


def compiled_url(root: str, version: str) -> str:
    """The compiled form of a version."""
    return storage.join(version_url(root, version), COMPILED)


def require_compiled(root: str, manifest: dict[str, Any]) -> None:
    """Reads the compiled form of a version that has one. Raises `ArtefactError` unless it is what the manifest says."""
    if manifest.get("compiled") is None:
        return
    url = compiled_url(root, manifest["version"])
    if not storage.exists(url):
        raise _damaged(url, "the file is missing", _REMEDY)
    _require(url, storage.size(url), storage.sha256(url), manifest["compiled"])


def fetch_compiled(root: str, manifest: dict[str, Any], local: Path) -> None:
    """Copies the compiled form of a version to a local file. Raises `ArtefactError` as `require_compiled` does."""
    url = compiled_url(root, manifest["version"])
    try:
        storage.fetch_file(url, local)
    except FileNotFoundError:
        raise _damaged(url, "the file is missing", _REMEDY) from None
    _require(url, local.stat().st_size, storage.sha256(str(local)), manifest["compiled"])


def _require(url: str, size: int, digest: str, entry: dict[str, Any]) -> None:
    if size != entry["bytes"]:
        raise _damaged(url, f"{size} bytes, the manifest says {entry['bytes']}", _REMEDY)
    if digest != entry["sha256"]:
        raise _damaged(url, f"SHA-256 {digest}, the manifest says {entry['sha256']}", _REMEDY)


def parse_pointer(url: str, data: bytes) -> dict[str, Any]:
    """The document of a pointer. Raises `ArtefactError` when it names no version."""
    try:
        pointer = json.loads(data)
    except (ValueError, RecursionError):
        raise _damaged(url, "not JSON", "roll back to a version") from None
    if not isinstance(pointer, dict) or not _is_name(pointer.get("version")):
        raise _damaged(url, "it names no version", "roll back to a version")
    previous, left = pointer.get("previous"), pointer.get("left")
    if not (
        isinstance(pointer.get("manifest_sha256"), str)
        and _SHA256.fullmatch(pointer["manifest_sha256"])
        and (previous is None or _is_name(previous))
        and _is_time(pointer.get("swapped_at"))
        and isinstance(left, dict)
        and all(_is_name(name) and _is_time(time) for name, time in left.items())
    ):
        raise _damaged(url, "fields are missing, or not what they should be", "roll back to a version")
    return pointer


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether everything that readers use is there, in its type, and no file lies outside the version."""
    entries, about, previous = manifest.get("files"), manifest.get("about"), manifest.get("previous")
    compiled = manifest.get("compiled")
    return (
        _is_count(manifest.get("buckets"))
        and manifest["buckets"] > 0
        and _is_time(manifest.get("published_at"))
        and (previous is None or _is_name(previous))
        and isinstance(manifest.get("figures"), dict)
        and (
            compiled is None
            or (isinstance(compiled, dict) and _is_count(compiled.get("format")) and _is_file(compiled))
        )
        and isinstance(about, dict)
        and _is_count(about.get("watermark_us"))
        and about["watermark_us"] <= _MAX_WATERMARK_US
        and isinstance(entries, list)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("path"), str)
            and _ENTRY.fullmatch(entry["path"]) is not None
            and _is_count(entry.get("rows"))
            and _is_file(entry)
            for entry in entries
        )
        and len({entry["path"] for entry in entries}) == len(entries)
    )


def _is_file(entry: dict[str, Any]) -> bool:
    digest = entry.get("sha256")
    return _is_count(entry.get("bytes")) and isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _damaged(url: str, what: str, remedy: str) -> ArtefactError:
    return ArtefactError(f"{url}: damaged: {what}; {remedy}")
