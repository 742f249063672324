"""Publishing one night: write, audit by re-reading, manifest, swap of the pointer, in this order.

    manifest = publish(root, version, tonight.blocks(), about, expected)
    rollback(root, older_version)

Invariant: a reader sees exactly the old or exactly the new version whatever operation fails, and running the same night
again converges: a version without a manifest is written anew, one with a manifest is never touched, only verified and
pointed at. A failed audit leaves the pointer as it was and raises. Publishing fails closed; serving fails open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from conrec import storage
from conrec.blocklist import versions
from conrec.blocklist.audit import Expected, Figures, audit
from conrec.blocklist.buckets import bucket_path
from conrec.errors import ArtefactError, AuditError

if TYPE_CHECKING:
    from conrec.blocklist.night import Block


def publish(
    root: str, version: str, blocks: Iterable[Block], about: dict[str, Any], expected: Expected
) -> dict[str, Any]:
    """Publishes a version and returns its manifest.

    `blocks` are read only if the version is not complete yet. `about` is the JSON that identifies the night: at least
    `watermark_us`, `generated_users` and `failed_users`; the same inputs must give the same `about`.
    Raises `AuditError` naming what is wrong and where, with the pointer unchanged; `ArtefactError` when the version is
    complete and holds another night, or is damaged.
    """
    # What a reader gets back is JSON: tuples are lists there.
    about = json.loads(json.dumps(about, allow_nan=False))
    complete = versions.read_manifest(root, version)
    if complete is None:
        manifest = _write(root, version, blocks, about)
        findings = audit(root, manifest, expected)
        if findings:
            raise AuditError(
                f"{versions.version_url(root, version)}: {len(findings)} findings, nothing was published:\n"
                + "\n".join(f"  {finding}" for finding in findings)
            )
        digest = versions.create_manifest(root, version, manifest)
    else:
        manifest, digest = complete
        keys = about.keys() | manifest["about"].keys()
        different = [key for key in keys if about.get(key) != manifest["about"].get(key)]
        if different:
            raise ArtefactError(
                f"version {version} is complete and holds another night (different: {', '.join(sorted(different))}); "
                "versions are immutable: publish under another name"
            )
        _verify(root, manifest)
    _point(root, version, digest)
    return manifest


def rollback(root: str, version: str) -> None:
    """Points readers at an older version, after verifying every file of it.

    Raises `ArtefactError` when the version is unknown, incomplete or damaged; the pointer is unchanged then.
    """
    complete = versions.read_manifest(root, version)
    if complete is None:
        raise ArtefactError(f"{versions.version_url(root, version)}: no complete version; name one with a manifest")
    manifest, digest = complete
    _verify(root, manifest)
    _point(root, version, digest)


def _write(root: str, version: str, blocks: Iterable[Block], about: dict[str, Any]) -> dict[str, Any]:
    """Writes the files of a version and returns the manifest that they will have."""
    url = versions.version_url(root, version)
    _clear(url)
    figures = Figures()
    entries = []
    for block in blocks:
        figures.add(block.items, block.rules)
        for shape, table in (("data", block.items), ("rules", block.rules)):
            entries.append(_write_table(url, bucket_path(shape, block.bucket), table))
    return {
        "schema_version": versions.SCHEMA_VERSION,
        "version": version,
        "published_at": _now(),
        "buckets": len(entries) // 2,
        "files": sorted(entries, key=lambda entry: str(entry["path"])),
        "figures": figures.to_json(),
        "about": about,
    }


def _write_table(url: str, path: str, table: pa.Table) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    # Small row groups with statistics: a consumer that filters by user reads one of them, since rows are sorted.
    parquet.write_table(table, sink, compression="zstd", row_group_size=1 << 16)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(url, path), data)
    return {"path": path, "bytes": len(data), "rows": len(table), "sha256": hashlib.sha256(data).hexdigest()}


def _clear(url: str) -> None:
    """Removes what an interrupted run left in a version that has no manifest; it may have had other buckets."""
    files, path = storage.filesystem(url)
    # Not storage.list_files, which leaves out the hidden partial files of a killed process.
    for leftover in files.find(path):
        files.rm_file(leftover)


def _verify(root: str, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:
        versions.read_entry(root, manifest["version"], entry)


def _point(root: str, version: str, digest: str) -> None:
    try:
        pointer = versions.read_pointer(root)
    except ArtefactError:
        pointer = None  # a damaged pointer is mended by the swap
    if pointer is not None and (pointer["version"], pointer["manifest_sha256"]) == (version, digest):
        return
    versions.write_pointer(root, version, digest, None if pointer is None else pointer["version"], _now())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
