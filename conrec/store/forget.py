"""Taking people out of what was published: a version that holds one is written again without them, under another name.

    forget(root, ["alice"])      # {"20260101T000000Z-1ceba6b609eb": "20260101T000000Z.1-1ceba6b609eb"}

A published version never changes, so that whoever reads one reads one. The other version has every row of everybody
else, the time at which the first was published, and names what it takes the place of; pointers follow, then the first
one goes. Readers that were opening it find the pointer moved and open the other; those that have it keep it until they
refresh.

Invariant: a pointer names a whole version whatever fails, and running again converges: a version that was completed
takes the place of the one that it names, one that was not is written anew, and of what was never completed whatever
may hold one of the people is removed. Nothing may be publishing meanwhile: a night that began before knows them still.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet

from conrec import storage
from conrec.buckets import user_buckets
from conrec.errors import ArtefactError, PublishError
from conrec.serving import versions
from conrec.serving.rows import bucket_path
from conrec.store import pointers
from conrec.store.audit import Figures
from conrec.store.compiled import with_compiled
from conrec.store.garbage import remove_version
from conrec.store.lock import Lock, describe, is_abandoned
from conrec.store.publish import clear, store_errors, write_table

_LEASE = timedelta(minutes=15)
"""Begins anew with every bucket."""
_COUNTED = {"data": ["user_id", "reason"], "rules": ["user_id"]}
"""Columns that figures are counted from."""
_NAME = re.compile(r"(?P<head>.*?)(?:\.(?P<number>\d+))?(?P<night>-[^-]*)?")
REPLACES = "replaces"
"""Of a manifest: the names of the versions that it takes the place of, the latest first."""


def forget(root: str, users: Sequence[str]) -> dict[str, str]:
    """Takes people out of every version of a store; returns the names that changed, the old one -> the new one.

    Raises `PublishError` where somebody publishes or forgets meanwhile, or the store fails, `ArtefactError` for a
    version that cannot be read: what it holds is not known.
    """
    with store_errors(root):
        _require_silence(root)
        with Lock(pointers.lock_url(root, "forget"), _LEASE, "forgetting people") as lock:
            renamed = dict(_finish(root))
            complete = []
            for name in versions.version_names(root):
                read = versions.read_manifest(root, name)
                if read is not None:
                    complete.append(read[0])
                elif _may_hold(versions.version_url(root, name), users):
                    storage.remove(versions.version_url(root, name))
            for manifest in sorted(complete, key=lambda one: datetime.fromisoformat(one["published_at"])):
                if _holds(root, manifest, users):
                    other, digest = _write_without(root, manifest, users, lock)
                    _take_place(root, manifest["version"], other, digest)
                    renamed[manifest["version"]] = other["version"]
            return renamed


def replaced(root: str) -> dict[str, str]:
    """Names of versions that went, by whatever run, and of those that took their place."""
    manifests = [manifest for manifest, _ in versions.read_manifests(root)]
    names = {name: manifest["version"] for manifest in manifests for name in manifest.get(REPLACES, [])}
    there = {manifest["version"] for manifest in manifests}
    return {name: other for name, other in names.items() if name not in there}


def file_holds(url: str, users: Sequence[str]) -> bool:
    """Whether a Parquet file has a row whose `user_id` is one of these; of a sorted file little is read.

    Raises `ArtefactError` where it cannot be read.
    """
    files, path = storage.filesystem(url)
    try:
        with files.open(path, "rb") as file:
            if "user_id" not in parquet.read_schema(file).names:
                return False
            rows = parquet.read_table(file, columns=["user_id"], filters=pc.field("user_id").isin(list(users)))
            return len(rows) > 0
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{url}: cannot be searched: {error}; delete it, and run again") from None


def without(table: pa.Table, users: Sequence[str]) -> pa.Table:
    """The rows of everybody else."""
    ids = table["user_id"].cast(pa.large_string())
    return table.filter(pc.invert(pc.is_in(ids, value_set=pa.array(users, pa.large_string()))))


def digest(data: bytes) -> str:
    """SHA-256 as manifests have it."""
    return hashlib.sha256(data).hexdigest()


def mentions(text: str, users: Sequence[str]) -> bool:
    """Whether a message names one of these as messages do: `user 17`, `user '17'`, or within quotes."""
    ids = "|".join(re.escape(user) for user in users if user)
    return bool(ids) and re.search(rf"(\buser\w*\W{{1,4}}|['\"])({ids})(?!\w)", text) is not None


def is_told_of(document: dict[str, Any], users: Sequence[str]) -> bool:
    """Whether a message in a manifest, or in the report of a failed audit, names one of these.

    Of these documents messages alone are about people; a figure or a year may look like a user.
    """
    messages = list(document.get("about", {}).get("failures", []))
    messages += [finding["what"] for finding in document.get("findings", [])]
    return any(mentions(text, users) for text in messages)


def _require_silence(root: str) -> None:
    """Raises `PublishError` where a version is being written."""
    folder = storage.join(root, "locks")
    for name in storage.list_files(folder):
        held = storage.read_bytes(storage.join(folder, name))
        if not is_abandoned(held):
            raise PublishError(f"{folder}/{name}: held by {describe(held)}; run again when it is done")


def _finish(root: str) -> Iterator[tuple[str, str]]:
    """Versions that a run which was killed had completed take the place of those that they were made from."""
    for manifest, digest in list(versions.read_manifests(root)):
        for name in manifest.get(REPLACES, [])[:1]:
            if versions.read_manifest(root, name) is not None:
                _take_place(root, name, manifest, digest)
                yield name, manifest["version"]


def _holds(root: str, manifest: dict[str, Any], users: Sequence[str]) -> bool:
    if is_told_of(manifest, users):
        return True
    return any(
        pc.any(pc.is_in(table["user_id"], value_set=pa.array(users))).as_py()
        for bucket in sorted(_buckets_of(manifest, users))
        for _, table, _ in _tables(root, manifest, bucket)
    )


def _may_hold(url: str, users: Sequence[str]) -> bool:
    """Whether a half version may hold one of these: partial and compiled files are not searched."""
    names = [name for name in storage.list_files(url, hidden=True) if ".parquet" in name or versions.COMPILED in name]
    return any(not name.endswith(".parquet") or file_holds(storage.join(url, name), users) for name in names)


def _buckets_of(manifest: dict[str, Any], users: Sequence[str]) -> set[int]:
    return set(user_buckets(pa.array(users, pa.string()), manifest["buckets"]).tolist())


def _tables(
    root: str, manifest: dict[str, Any], bucket: int, whole: bool = True
) -> Iterator[tuple[dict[str, Any], pa.Table, bytes]]:
    """Entry, rows as they were published, and bytes of both files of a bucket, items first.

    Not `whole`: the columns that figures are counted from, which takes a third of the time.
    """
    entries = {entry["path"]: entry for entry in manifest["files"]}
    for shape in ("data", "rules"):
        entry = entries.get(bucket_path(shape, bucket))
        if entry is None:
            url = versions.version_url(root, manifest["version"])
            raise ArtefactError(f"{url}: names no {bucket_path(shape, bucket)}; delete this version")
        data = versions.read_entry(root, manifest["version"], entry)
        yield entry, parquet.read_table(pa.BufferReader(data), columns=None if whole else _COUNTED[shape]), data


def _write_without(root: str, manifest: dict[str, Any], users: Sequence[str], lock: Lock) -> tuple[dict[str, Any], str]:
    """Writes the other version; returns its manifest and digest."""
    name = _successor(root, manifest["version"])
    url, affected = versions.version_url(root, name), _buckets_of(manifest, users)
    with Lock(pointers.lock_url(root, name), _LEASE, f"publishing {name}") as writing:
        clear(url)
        figures, entries = Figures(), []
        for bucket in range(manifest["buckets"]):
            lock.renew()
            writing.renew()
            kept = []
            for entry, table, data in _tables(root, manifest, bucket, whole=bucket in affected):
                kept.append(without(table, users) if bucket in affected else table)
                if bucket in affected:
                    entries.append(write_table(url, entry["path"], kept[-1]))
                else:
                    storage.write_bytes(storage.join(url, entry["path"]), data)
                    entries.append(entry)
            figures.add(*kept)
        failures = [text for text in manifest["about"].get("failures", []) if not mentions(text, users)]
        other = manifest | {
            "version": name,
            "files": sorted(entries, key=lambda entry: str(entry["path"])),
            "figures": figures.to_json(),
            "about": manifest["about"] | ({"failures": failures} if "failures" in manifest["about"] else {}),
            REPLACES: [manifest["version"], *manifest.get(REPLACES, [])],
        }
        for entry in entries:
            versions.read_entry(root, name, entry)
        if manifest.get("compiled") is not None:

            def renew() -> None:
                lock.renew()
                writing.renew()

            other = with_compiled(root, other, renew)
        writing.check()
        return other, pointers.create_manifest(root, name, other)


def _successor(root: str, name: str) -> str:
    """The first name of the same night that no complete version has: its number stands before the night's own part."""
    parts = _NAME.fullmatch(name)
    assert parts is not None
    number = int(parts["number"] or 0)
    while True:
        number += 1
        other = f"{parts['head']}.{number}{parts['night'] or ''}"
        if versions.read_manifest(root, other) is None:
            return other


def _take_place(root: str, name: str, manifest: dict[str, Any], digest: str) -> None:
    """Moves the pointers from a version to the one that takes its place, then removes it."""
    for pointer in versions.POINTERS:
        pointers.rename_in_pointer(pointers.observe(root, pointer), name, manifest["version"], digest)
    if not remove_version(root, name):
        raise PublishError(f"{root}: somebody pointed readers at {name} meanwhile; run again")
