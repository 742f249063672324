"""Where published versions lie, and the one object that changes.

    <root>/versions/<version>/data/*.parquet, rules/*.parquet    written once
    <root>/versions/<version>/manifest.json                      created last, exclusively: the version is whole
    <root>/CURRENT.json                                          names a version and the digest of its manifest

Invariant: bytes are only handed out when size and SHA-256 agree with the manifest, and a manifest only when its digest
agrees with the pointer. Needs no more than pyarrow, fsspec and numpy, since serving reads through it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from conrec import storage
from conrec.errors import ArtefactError, DataError

SCHEMA_VERSION = 1
"""Of the manifest and the tables; a reader refuses a later one."""
POINTER = "CURRENT.json"
MANIFEST = "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"(data|rules)/[A-Za-z0-9][A-Za-z0-9._-]*\.parquet")


def version_url(root: str, version: str) -> str:
    """Folder of a version. Raises `ArtefactError` for a name that could lead elsewhere."""
    if not isinstance(version, str) or not _NAME.fullmatch(version):
        raise ArtefactError(
            f"{version!r} is not the name of a version; use letters, digits, dot, dash and underscore, at most 128"
        )
    return storage.join(root, "versions", version)


def read_pointer(root: str) -> dict[str, Any] | None:
    """The pointer, or None when nothing was ever published. Raises `ArtefactError` when it is damaged."""
    url = storage.join(root, POINTER)
    try:
        pointer = storage.read_json(url)
    except FileNotFoundError:
        return None
    except DataError:
        raise _damaged(url, "not JSON", "roll back to a version") from None
    if not isinstance(pointer, dict) or not all(
        isinstance(pointer.get(key), str) for key in ("version", "manifest_sha256")
    ):
        raise _damaged(url, "it names no version", "roll back to a version")
    return pointer


def write_pointer(root: str, version: str, manifest_sha256: str, previous: str | None, swapped_at: str) -> None:
    """Swaps the pointer; a reader sees the old one or the new one."""
    document = {
        "version": version,
        "manifest_sha256": manifest_sha256,
        "previous": previous,
        "swapped_at": swapped_at,
    }
    storage.write_json(storage.join(root, POINTER), document)


def read_manifest(root: str, version: str, sha256: str | None = None) -> tuple[dict[str, Any], str] | None:
    """The manifest of a version and its SHA-256, or None when the version has none: it never was complete.

    Raises `ArtefactError` when its digest is not `sha256`, it is damaged, or it was written by a later release.
    """
    url = storage.join(version_url(root, version), MANIFEST)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    remedy = "roll back to another version, or delete this one and publish again"
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256:
        raise _damaged(url, f"SHA-256 {digest}, the pointer says {sha256}", remedy)
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise _damaged(url, f"not JSON: {error}", remedy) from None
    if not isinstance(manifest, dict) or manifest.get("version") != version:
        raise _damaged(url, f"it does not name version {version}", remedy)
    schema_version = manifest.get("schema_version")
    if not isinstance(schema_version, int) or schema_version > SCHEMA_VERSION:
        raise ArtefactError(
            f"{url}: schema version {schema_version!r}, this release reads up to {SCHEMA_VERSION}; "
            "install a newer conrec"
        )
    if not _is_complete(manifest):
        raise _damaged(url, "fields are missing", remedy)
    return manifest, digest


def create_manifest(root: str, version: str, manifest: dict[str, Any]) -> str:
    """Creates the manifest and returns its SHA-256. Raises `ArtefactError` when there already is one."""
    url = storage.join(version_url(root, version), MANIFEST)
    data = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    files, path = storage.filesystem(url)
    try:
        if isinstance(files, LocalFileSystem):
            # A file opened with "x" exists before it is whole; a link to a whole one appears at once, or not at all.
            folder, name = os.path.split(path)
            temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.partial")
            storage.write_bytes(temporary, data)
            try:
                os.link(temporary, path)
            finally:
                os.unlink(temporary)
        else:
            files.pipe_file(path, data, mode="create")
    except FileExistsError:
        raise ArtefactError(
            f"{url}: another publisher completed this version meanwhile; run again to adopt it"
        ) from None
    return hashlib.sha256(data).hexdigest()


def read_entry(root: str, version: str, entry: dict[str, Any]) -> bytes:
    """The bytes of one file of a version. Raises `ArtefactError` unless they are what the manifest says."""
    url = storage.join(version_url(root, version), entry["path"])
    remedy = "roll back to another version, or delete this one and publish again"
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise _damaged(url, "the file is missing", remedy) from None
    if len(data) != entry["bytes"]:
        raise _damaged(url, f"{len(data)} bytes, the manifest says {entry['bytes']}", remedy)
    digest = hashlib.sha256(data).hexdigest()
    if digest != entry["sha256"]:
        raise _damaged(url, f"SHA-256 {digest}, the manifest says {entry['sha256']}", remedy)
    return data


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether everything that readers use is there, in its type, and no file lies outside the version."""
    entries = manifest.get("files")
    return (
        isinstance(manifest.get("buckets"), int)
        and manifest["buckets"] > 0
        and isinstance(manifest.get("published_at"), str)
        and isinstance(manifest.get("about"), dict)
        and isinstance(manifest["about"].get("watermark_us"), int)
        and isinstance(entries, list)
        and all(
            isinstance(entry, dict)
            and isinstance(entry.get("path"), str)
            and _ENTRY.fullmatch(entry["path"]) is not None
            and isinstance(entry.get("bytes"), int)
            and isinstance(entry.get("rows"), int)
            and isinstance(entry.get("sha256"), str)
            for entry in entries
        )
    )


def _damaged(url: str, what: str, remedy: str) -> ArtefactError:
    return ArtefactError(f"{url}: damaged: {what}; {remedy}")
