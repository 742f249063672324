"""Publishing one night: write, audit by re-reading, compile, manifest, swap of the pointer, in this order.

    manifest = publish(root, version, tonight.blocks(), tonight.about, expected)
    rollback(root, older_version)
    verify(root, version)

Invariant: a reader sees exactly the old or exactly the new version whatever operation fails, and running the same night
again converges: a version without a manifest is written anew, one with a manifest is never touched, only verified and
pointed at. A failed audit leaves the pointer as it was and raises. Publishing fails closed; serving fails open.

Of two publishers at once one wins and the other raises `PublishError`: one version is written under one lock, and the
pointer is swapped only if it is what it was when publishing began. The watermark never goes back, except by `rollback`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

import conrec
from conrec import storage
from conrec.errors import ArtefactError, PublishError
from conrec.parallel import Mapped, in_process
from conrec.serving import versions
from conrec.serving.rows import bucket_path
from conrec.store import pointers
from conrec.store.audit import Expected, Figures, audit, failure
from conrec.store.compiled import with_compiled
from conrec.store.lock import Lock

WRITING_LEASE = timedelta(minutes=15)
"""Begins anew with every bucket that is written or audited; longer than one takes."""

IDENTITY = (
    *("watermark_us", "settings", "policy", "validated", "catalogue", "codebook", "calibration", "audience"),
    *("generated_users", "failed_users", "failures", "deadline"),
)
"""What of `about` says which night a version holds. What is counted beside it moves with the items that other nights of
the same root have met meanwhile."""


@dataclass(frozen=True)
class Block:
    """One bucket of users in both shapes: `items` as BLOCKLIST, `rules` as RULES, each sorted by user."""

    bucket: int
    items: pa.Table
    rules: pa.Table


def publish(
    root: str,
    version: str,
    blocks: Iterable[Block],
    about: Callable[[], dict[str, Any]],
    expected: Expected,
    pointer: versions.Pointer = "current",
    mapped: Mapped = in_process,
) -> dict[str, Any]:
    """Publishes a version and returns its manifest.

    `blocks` are read only if the version is not complete yet. `about`, which is asked after them, gives what is
    told of the night as JSON: at least `watermark_us`, `generated_users` and `failed_users`; the same inputs must give
    the same for all of IDENTITY.
    Raises `AuditError` naming what is wrong and where, with the pointer unchanged; `ArtefactError` when the version is
    complete and holds another night, or is damaged; `PublishError` when another publisher was first, the pointer names
    a version with a later watermark, or the store fails.
    """
    versions.version_url(root, version)

    def told() -> dict[str, Any]:
        # What a reader gets back is JSON: tuples are lists there.
        document: dict[str, Any] = json.loads(json.dumps(about(), allow_nan=False))
        return document

    before = require_onward(root, version, expected.watermark_us, pointer)
    with store_errors(root):
        complete = versions.read_manifest(root, version)
    if complete is not None:
        return _adopt(root, complete, told(), before)
    with store_errors(root), Lock(pointers.lock_url(root, version), WRITING_LEASE, f"publishing {version}") as lock:
        complete = versions.read_manifest(root, version)
        if complete is None:
            previous = None if before.version == version else before.version
            manifest = write_version(root, version, blocks, {}, previous, lock) | {"about": told()}
            findings = audit(root, manifest, expected, mapped, lock.renew)
            if findings:
                raise failure(root, manifest, findings)
            manifest = with_compiled(root, manifest, lock.renew, mapped)
            lock.check()
            digest = pointers.create_manifest(root, version, manifest)
            _point(root, before, version, digest)
            return manifest
    return _adopt(root, complete, told(), before)


def require_onward(
    root: str, version: str, watermark_us: int, pointer: versions.Pointer = "current"
) -> pointers.Observed:
    """The pointer, where a version of this watermark may follow what it names; asked before hours of work, too.

    Raises `PublishError` where readers would go back by it, or the store fails.
    """
    with store_errors(root):
        before = pointers.observe(root, pointer)
        _never_backwards(root, before, version, watermark_us)
        return before


def rollback(root: str, version: str, pointer: versions.Pointer = "current") -> None:
    """Points readers at an older version, after verifying every file of it.

    Raises `ArtefactError` when the version is unknown, incomplete or damaged, `PublishError` when a publisher moved the
    pointer meanwhile; the pointer is not touched then.
    """
    with store_errors(root):
        before = pointers.observe(root, pointer)
        _, digest = verified(root, version)
        _point(root, before, version, digest)


@dataclass(frozen=True)
class Verified:
    """A version whose every byte was read again."""

    version: str
    files: int
    bytes: int
    rows: int
    """Item rows and rules."""


def verify(root: str, version: str | None = None) -> Verified:
    """Reads every file of a version again, by default of the current one, and holds it against the manifest.

    Raises `ArtefactError` that names each file which is missing, damaged, or not named by the manifest.
    """
    pointed = versions.require_pointer(root) if version is None else versions.read_pointer(root)
    if pointed is not None and version in (None, pointed["version"]):
        version, sha256 = pointed["version"], pointed["manifest_sha256"]
    else:
        sha256 = None
    assert version is not None
    manifest, _ = verified(root, version, sha256)
    entries = manifest["files"]
    files = [*entries, *filter(None, [manifest.get("compiled")])]
    return Verified(
        version, len(files), sum(entry["bytes"] for entry in files), sum(entry["rows"] for entry in entries)
    )


def verified(root: str, version: str, sha256: str | None = None) -> tuple[dict[str, Any], str]:
    """Manifest and digest of a version that is whole. Raises `ArtefactError` that names all that is wrong with it."""
    url = versions.version_url(root, version)
    complete = versions.complete_manifest(root, version, sha256)
    damage = []
    for entry in complete[0]["files"]:
        try:
            versions.read_entry(root, version, entry)
        except ArtefactError as error:
            damage.append(str(error))
    try:
        versions.require_compiled(root, complete[0])
    except ArtefactError as error:
        damage.append(str(error))
    # DuckDB and others read whatever lies in the folder.
    named = {entry["path"] for entry in complete[0]["files"]} | {versions.MANIFEST}
    named |= {versions.COMPILED} if complete[0].get("compiled") else set()
    damage += [f"{url}/{path}: the manifest does not name it" for path in storage.list_files(url) if path not in named]
    if damage:
        raise ArtefactError("\n".join(damage))
    return complete


def _adopt(
    root: str, complete: tuple[dict[str, Any], str], about: dict[str, Any], before: pointers.Observed
) -> dict[str, Any]:
    """Points at a version that another run completed, if it holds the same night."""
    manifest, digest = complete
    version = manifest["version"]
    different = [name for name in IDENTITY if about.get(name) != manifest["about"].get(name)]
    if different:
        raise ArtefactError(
            f"version {version} is complete and holds another night (different: {', '.join(different)}), and a version "
            f"never changes: conrec rollback {version} points at it as it is; or delete the folder "
            f"{versions.version_url(root, version)} and run again"
        )
    with store_errors(root):
        verified(root, version)
        _point(root, before, version, digest)
    return manifest


def _never_backwards(root: str, before: pointers.Observed, version: str, watermark_us: int) -> None:
    """Refuses a version older than the one that readers have."""
    if before.snapshot.data is None:
        return
    current = _current_manifest(root, before)
    if current is not None and current["version"] != version and watermark_us < current["about"]["watermark_us"]:
        file = versions.POINTERS[before.pointer]
        ahead = datetime.now(UTC).timestamp() * 1e6 < current["about"]["watermark_us"]
        raise PublishError(
            f"version {version} is of {_time(watermark_us)}, and {file} names {current['version']} of "
            f"{_time(current['about']['watermark_us'])}: readers never go back by themselves; conrec rollback points "
            "them at an older version"
            + (
                f". That version lies ahead of the clock: roll back; delete {file} where there is none older"
                if ahead
                else ""
            )
        )


def _current_manifest(root: str, before: pointers.Observed) -> dict[str, Any] | None:
    """What readers have; where that cannot be read, the complete version with the latest watermark stands in."""
    if before.document is not None:
        try:
            complete = versions.read_manifest(root, before.document["version"], before.document["manifest_sha256"])
        except ArtefactError:
            complete = None
        if complete is not None:
            return complete[0]
    manifests = (manifest for manifest, _ in versions.read_manifests(root))
    return max(manifests, key=lambda manifest: int(manifest["about"]["watermark_us"]), default=None)


def _point(root: str, before: pointers.Observed, version: str, digest: str) -> None:
    old = before.document
    if old is not None and (old["version"], old["manifest_sha256"]) == (version, digest):
        return
    pointers.swap_pointer(before, version, digest)
    # Garbage collection looks at the pointers after it took a manifest away, this looks at the manifest after it moved
    # the pointer: whichever comes second sees the other.
    if versions.read_manifest(root, version) is None:
        if before.snapshot.data is not None:
            pointers.replace_pointer(pointers.observe(root, before.pointer), before.snapshot.data)
        raise PublishError(f"version {version} was collected as garbage meanwhile; name another, or publish it again")


def write_version(
    root: str,
    version: str,
    blocks: Iterable[Block],
    about: dict[str, Any],
    previous: str | None = None,
    lock: Lock | None = None,
) -> dict[str, Any]:
    """Writes the files of a version and returns the manifest that they will have."""
    url = versions.version_url(root, version)
    clear(url)
    figures = Figures()
    entries = []
    for block in blocks:
        if lock is not None:
            lock.renew()
        figures.add(block.items, block.rules)
        for shape, table in (("data", block.items), ("rules", block.rules)):
            entries.append(write_table(url, bucket_path(shape, block.bucket), table))
    if lock is not None:
        lock.renew()
    return {
        "schema_version": versions.SCHEMA_VERSION,
        "version": version,
        "published_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        "previous": previous,
        "code_version": conrec.__version__,
        "buckets": len(entries) // 2,
        "files": sorted(entries, key=lambda entry: str(entry["path"])),
        "figures": figures.to_json(),
        "about": about,
    }


def write_table(url: str, path: str, table: pa.Table) -> dict[str, Any]:
    """Writes one file of a version and returns its entry in the manifest."""
    sink = pa.BufferOutputStream()
    # Small row groups with statistics: a consumer that filters by user reads one of them, since rows are sorted.
    parquet.write_table(table, sink, compression="zstd", row_group_size=1 << 16)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(url, path), data)
    return {"path": path, "bytes": len(data), "rows": len(table), "sha256": hashlib.sha256(data).hexdigest()}


def clear(url: str) -> None:
    """Removes what an interrupted run left in a version that has no manifest; it may have had other buckets."""
    files, path = storage.filesystem(url)
    files.invalidate_cache(path)
    # Not storage.list_files, which leaves out the hidden partial files of a killed process.
    for leftover in files.find(path):
        files.rm_file(leftover)


@contextlib.contextmanager
def store_errors(root: str) -> Iterator[None]:
    """A full disk, a store that is read-only or out of reach: told as what it is to a publisher."""
    try:
        yield
    except OSError as error:
        raise PublishError(
            f"{root}: the store failed: {error}; readers keep a whole version, and running again goes on from here"
        ) from error


def _time(watermark_us: int) -> str:
    return datetime.fromtimestamp(watermark_us / 1e6, UTC).isoformat(timespec="seconds")
