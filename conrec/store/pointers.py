"""What a publisher changes of a store: it creates a manifest once, and swaps a pointer.

    before = observe(root, "current")
    swap_pointer(before, "v7", create_manifest(root, "v7", manifest))

    <root>/CURRENT.json.lock, SHADOW.json.lock      held while a pointer is swapped, unless it is on S3
    <root>/locks/<version>.lock                     held while a version is written

Invariant: a pointer is only replaced while it is what its writer has read. How versions lie in a store and are read
stands in conrec/serving/versions.py.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from conrec import storage
from conrec.errors import ArtefactError, PublishError
from conrec.serving.versions import MANIFEST, POINTERS, Pointer, parse_pointer, pointer_url, version_url
from conrec.store.lock import Lock

SWAP_LEASE = timedelta(seconds=30)
"""A swap reads and writes one small file."""
LEFT_ENTRIES = 64
"""Versions whose time of leaving a pointer remembers: garbage collection spares readers who still open them."""


@dataclass(frozen=True)
class Observed:
    """A pointer as it was when it was read."""

    pointer: Pointer
    snapshot: storage.Snapshot
    document: dict[str, Any] | None
    """None when nothing was ever published, or the pointer is damaged."""

    @property
    def version(self) -> str | None:
        """The version that it names."""
        return None if self.document is None else self.document["version"]


def lock_url(root: str, version: str) -> str:
    """The lock that is held while a version is written."""
    version_url(root, version)
    return storage.join(root, "locks", f"{version}.lock")


def observe(root: str, pointer: Pointer = "current") -> Observed:
    """The pointer for one who wants to swap it; a damaged one too, since a swap mends it."""
    url = pointer_url(root, pointer)
    snapshot = storage.snapshot(url)
    try:
        document = None if snapshot.data is None else parse_pointer(url, snapshot.data)
    except ArtefactError:
        document = None
    return Observed(pointer, snapshot, document)


def swap_pointer(before: Observed, version: str, manifest_sha256: str) -> None:
    """Points at a version, if the pointer still is what was observed; a reader sees the old one or the new one.

    Raises `PublishError` naming the winner when it was moved meanwhile.
    """
    old, now = before.document, datetime.now(UTC).isoformat(timespec="microseconds")
    left: dict[str, str] = {} if old is None else {**old["left"], old["version"]: now}
    left.pop(version, None)
    document = {
        "version": version,
        "manifest_sha256": manifest_sha256,
        "previous": None if old is None else old["version"],
        "swapped_at": now,
        "left": dict(sorted(left.items(), key=lambda entry: entry[1])[-LEFT_ENTRIES:]),
    }
    replace_pointer(before, json.dumps(document, indent=2).encode() + b"\n")


def rename_in_pointer(before: Observed, name: str, other: str, manifest_sha256: str) -> None:
    """Names `other` wherever the pointer names a version that it takes the place of, if it still is what was observed.

    Raises `PublishError` as `swap_pointer`.
    """
    document = before.document
    if document is None or name not in (document["version"], document["previous"], *document["left"]):
        return
    named = dict(document)
    if document["version"] == name:
        named |= {"version": other, "manifest_sha256": manifest_sha256}
    if document["previous"] == name:
        named["previous"] = other
    named["left"] = {other if key == name else key: time for key, time in document["left"].items()}
    replace_pointer(before, json.dumps(named, indent=2).encode() + b"\n")


def replace_pointer(before: Observed, data: bytes) -> None:
    """`swap_pointer` to the bytes of a pointer: compared and set by the store where it can, else under a lock."""
    url = before.snapshot.url
    if storage.has_conditional_put(url):
        if storage.replace_unchanged(before.snapshot, data):
            return
        _refuse_unless(data, storage.snapshot(url).data, url)  # ours: the store answered late, and the put was repeated
        return
    with Lock(f"{url}.lock", SWAP_LEASE, f"the swap of {POINTERS[before.pointer]}", wait=True) as lock:
        _refuse_unless(before.snapshot.data, storage.snapshot(url).data, url)
        lock.check()
        storage.write_bytes(url, data)


def _refuse_unless(expected: bytes | None, present: bytes | None, url: str) -> None:
    if present == expected:
        return
    try:
        winner = (
            "it is gone"
            if present is None
            else "it names {version} since {swapped_at}".format_map(parse_pointer(url, present))
        )
    except ArtefactError:
        winner = "it is damaged"
    raise PublishError(
        f"{url}: another publisher moved the pointer meanwhile: {winner}; look at conrec versions, then run again to "
        "adopt what this run has written"
    )


def create_manifest(root: str, version: str, manifest: dict[str, Any]) -> str:
    """Creates the manifest and returns its SHA-256. Raises `PublishError` when there already is another one."""
    url = storage.join(version_url(root, version), MANIFEST)
    data = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        storage.create_bytes(url, data)
    except FileExistsError:
        # Ours, if the store answered late and the put was tried again.
        if storage.read_bytes(url) != data:
            raise PublishError(
                f"{url}: another publisher completed this version meanwhile; run again to adopt it"
            ) from None
    return hashlib.sha256(data).hexdigest()
