"""Removes what no reader needs any more.

    collect_garbage(root, keep=14)
    collect_garbage(root, keep=14, dry_run=True)     # what it would remove

It keeps the newest `keep` complete versions, whatever a pointer names and the version before that, and everything that
readers may still be opening: versions published, or left by a pointer, within `grace`. Of what was never completed it
removes what is older than `min_orphan_age` and nobody is writing. Versions that this release cannot read stay.

Invariant: a manifest goes before its files, so that half a version is an orphan and never looks complete; and a version
that a rollback names while it is being removed comes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from conrec import storage
from conrec.artefact import MANIFEST
from conrec.errors import ArtefactError, ConfigError
from conrec.serving import versions
from conrec.store import pointers
from conrec.store.lock import Lock, is_abandoned, remove_abandoned

GRACE = timedelta(hours=1)
"""A reader that began to open a version is done with its files after this long."""
MIN_ORPHAN_AGE = timedelta(hours=24)
"""A version without a manifest, and a partial file, may be in the making for this long."""
_COLLECT_LEASE = timedelta(minutes=15)


@dataclass
class Collected:
    """What was removed, or would be."""

    versions: list[str] = field(default_factory=list)
    """Complete ones."""
    orphans: list[str] = field(default_factory=list)
    """Names of versions that have no manifest."""
    files: list[str] = field(default_factory=list)
    """Locks and partial files of processes that ended, relative to the root."""
    nights: list[str] = field(default_factory=list)
    """Folders of nights of which no version is left."""
    artefacts: list[str] = field(default_factory=list)
    """Catalogues, policies and what they are made of that nothing names any more, `policy/<version>`."""
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bytes of each, by the list that it stands in and its name."""
    unreadable: list[str] = field(default_factory=list)
    """Versions that stay because their manifest is damaged, or of another release: why."""

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return sum(self.sizes.values())

    def add(self, kind: str, name: str, size: int) -> None:
        """Notes a name in one of the lists, with its bytes."""
        getattr(self, kind).append(name)
        self.sizes[kind, name] = size

    def lines(self) -> list[str]:
        """All of it in words."""
        words = {"versions": "version", "orphans": "never completed", "files": "left over", "nights": "night"}
        words["artefacts"] = "artefact"
        removed = [(kind, name) for kind in words for name in getattr(self, kind)]
        lines = [f"{words[kind]}  {name}  {self.sizes[kind, name]:,} bytes" for kind, name in removed]
        return [*lines, *(f"! {why}" for why in self.unreadable), f"{len(lines)} removed, {self.bytes:,} bytes"]


@dataclass(frozen=True)
class File:
    """One file below a place."""

    path: str
    bytes: int
    changed_at: datetime


def collect_garbage(
    root: str,
    keep: int,
    grace: timedelta = GRACE,
    min_orphan_age: timedelta = MIN_ORPHAN_AGE,
    dry_run: bool = False,
    nights: str | None = None,
) -> Collected:
    """Removes old versions and leftovers, and returns what it removed.

    Below `nights` lies what each night generated, in a folder named as the last part of its version's name: one that
    no version is left of goes, unless it is younger than `min_orphan_age`.

    Raises `ConfigError` for a `keep` below 1, `ArtefactError` when a pointer is damaged or names a version that cannot
    be read: what readers need is not known then.
    """
    if keep < 1:
        raise ConfigError(f"keep is {keep}: at least 1 version must stay")
    now = datetime.now(UTC)
    needed = _needed(root, now - grace)
    collected = Collected()
    complete, orphans = [], []
    contents = _contents(root)
    for name in sorted(contents):
        try:
            read = versions.read_manifest(root, name)
        except ArtefactError as error:
            collected.unreadable.append(str(error))
            continue
        if read is None:
            orphans.append(name)
        else:
            complete.append(read[0])
    # Of a version that was written again, the other one is needed in its place.
    needed.update(one["version"] for one in complete if needed.intersection(one.get("replaces", [])))
    complete.sort(key=lambda manifest: datetime.fromisoformat(manifest["published_at"]), reverse=True)
    for manifest in complete[keep:]:
        name = manifest["version"]
        if name in needed or datetime.fromisoformat(manifest["published_at"]) > now - grace:
            continue
        if dry_run or remove_version(root, name):
            collected.add("versions", name, sum(file.bytes for file in contents[name]))
    for name in orphans:
        if max(file.changed_at for file in contents[name]) > now - min_orphan_age or _is_being_written(root, name):
            continue
        if not dry_run:
            # Nobody begins to write it meanwhile.
            with Lock(pointers.lock_url(root, name), _COLLECT_LEASE, f"the removal of {name}"):
                if versions.read_manifest(root, name) is not None:
                    continue
                storage.remove(versions.version_url(root, name))
        collected.add("orphans", name, sum(file.bytes for file in contents[name]))
    for file in _leftovers(root, contents, {*collected.versions, *collected.orphans}, now - min_orphan_age):
        if not dry_run:
            _remove_file(root, file.path)
        collected.add("files", file.path, file.bytes)
    if nights is not None:
        gone = {*collected.versions, *collected.orphans}
        needed = {name.split("-")[-1] for name in contents if name not in gone}
        _collect_nights(nights, collected, needed, now - min_orphan_age, dry_run)
    return collected


def _collect_nights(nights: str, collected: Collected, needed: set[str], before: datetime, dry_run: bool) -> None:
    folders = folders_below(nights)
    finished = [name for name, files in folders.items() if any(file.path.endswith(f"/{MANIFEST}") for file in files)]
    # Tonight keeps rows of the newest finished one, also where the audit let it publish nothing.
    needed = needed | {*sorted(finished, key=lambda folder: max(file.changed_at for file in folders[folder]))[-1:]}
    for folder, files in sorted(folders.items()):
        if folder in needed or max(file.changed_at for file in files) > before:
            continue
        if not dry_run:
            storage.remove_marked(storage.join(nights, folder), MANIFEST)
        collected.add("nights", folder, sum(file.bytes for file in files))


def _needed(root: str, since: datetime) -> set[str]:
    """Versions that the pointers name, named before, or left after `since`."""
    needed: set[str] = set()
    for pointer in versions.POINTERS:
        document = versions.read_pointer(root, pointer)
        if document is None:
            continue
        complete = versions.read_manifest(root, document["version"], document["manifest_sha256"])
        if complete is None:
            raise ArtefactError(
                f"{versions.pointer_url(root, pointer)}: names {document['version']}, which has no manifest; "
                "roll back to a version first"
            )
        left = (name for name, time in document["left"].items() if datetime.fromisoformat(time) > since)
        needed.update(filter(None, [document["version"], document["previous"], complete[0]["previous"], *left]))
    return needed


def _contents(root: str) -> dict[str, list[File]]:
    """Files of each folder below versions/, hidden ones too; a folder whose name no version can have is left out."""
    contents: dict[str, list[File]] = {}
    for file in files_below(root, "versions"):
        _, name, *inside = file.path.split("/")
        if not inside:
            continue
        with contextlib.suppress(ArtefactError):
            versions.version_url(root, name)
            contents.setdefault(name, []).append(file)
    return contents


def remove_version(root: str, name: str) -> bool:
    """Removes a complete version, unless a pointer names it by the time its manifest is gone."""
    url = versions.version_url(root, name)
    manifest_url = storage.join(url, versions.MANIFEST)
    with Lock(pointers.lock_url(root, name), _COLLECT_LEASE, f"the removal of {name}"):
        data = storage.read_bytes(manifest_url)
        storage.remove(manifest_url)
        try:
            pointed = [versions.read_pointer(root, pointer) for pointer in versions.POINTERS]
        except (ArtefactError, OSError):
            storage.create_bytes(manifest_url, data)
            raise
        if any(document is not None and document["version"] == name for document in pointed):
            storage.create_bytes(manifest_url, data)
            return False
        storage.remove(url)
        return True


def _is_being_written(root: str, name: str) -> bool:
    try:
        return not is_abandoned(storage.read_bytes(pointers.lock_url(root, name)))
    except FileNotFoundError:
        return False


def _leftovers(root: str, contents: dict[str, list[File]], removed: set[str], before: datetime) -> Iterable[File]:
    """Partial files and locks of processes that ended, outside of the versions that were removed."""
    kept = [file for name, files in contents.items() if name not in removed for file in files]
    outside = [file for file in files_below(root) if file.path.split("/")[0] != "versions"]
    for file in [*kept, *outside]:
        if storage.is_partial(file.path) and file.changed_at < before:
            yield file
    for file in outside:
        pointer_lock = file.path in {f"{pointer}.lock" for pointer in versions.POINTERS.values()}
        if pointer_lock or (file.path.startswith("locks/") and file.path.endswith(".lock")):
            with contextlib.suppress(FileNotFoundError):
                if is_abandoned(storage.read_bytes(storage.join(root, file.path))):
                    yield file


def _remove_file(root: str, path: str) -> None:
    url = storage.join(root, path)
    if path.endswith(".lock"):
        remove_abandoned(url)
    else:
        storage.remove(url)


def folders_below(url: str) -> dict[str, list[File]]:
    """Every file of each folder directly below a place."""
    folders: dict[str, list[File]] = {}
    for file in files_below(url):
        folder, *inside = file.path.split("/")
        if inside:
            folders.setdefault(folder, []).append(file)
    return folders


def files_below(root: str, *folders: str) -> list[File]:
    """All files below a folder of the root, hidden ones too; paths relative to the root."""
    files, base = storage.filesystem(root)
    _, path = storage.filesystem(storage.join(root, *folders))
    files.invalidate_cache(path)
    entries: dict[str, dict[str, Any]] = files.find(path, detail=True)
    return [
        File(name[len(base.rstrip("/")) + 1 :], int(info["size"]), _changed_at(info)) for name, info in entries.items()
    ]


def _changed_at(info: dict[str, Any]) -> datetime:
    """Local files say `mtime`, S3 `LastModified`, Google Cloud Storage `updated`, memory `created`."""
    keys = ("mtime", "LastModified", "updated", "created")
    value: str | float | datetime = next(info[key] for key in keys if key in info)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
