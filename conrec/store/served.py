"""Whether serving can have what a finished night published.

    why = unserved(root, version)          # None, or what is gone or damaged
    if why: remove_damaged(root, version)  # then publish the night again

A pointer that names another sound version was moved by a person or by a later night, and stays. Invariant: a sound
version is never removed.
"""

from __future__ import annotations

import json

from conrec import storage
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.store import pointers
from conrec.store.lock import Lock
from conrec.store.publish import WRITING_LEASE, verified


def unserved(root: str, version: str, pointer: versions.Pointer = "current") -> str | None:
    """Why serving cannot have a version that was published, None where it has it, or another one that is whole.

    Reads every byte of what the pointer names.
    """
    file = versions.POINTERS[pointer]
    try:
        named = versions.read_pointer(root, pointer)
        if named is None:
            return f"{file} is gone"
        if named["version"] != version:
            versions.complete_manifest(root, named["version"], named["manifest_sha256"])
            return None
        verified(root, version, named["manifest_sha256"])
    except ArtefactError as error:
        return str(error)
    return None


def remove_damaged(root: str, version: str) -> None:
    """Removes a version that is not what its manifest says, its manifest first, so that it can be published again.

    One without a manifest is written anew as it is, and one of another release is for that release.
    """
    manifest_url = storage.join(versions.version_url(root, version), versions.MANIFEST)
    if not storage.exists(manifest_url) or _is_of_another_release(storage.read_bytes(manifest_url)):
        return
    with Lock(pointers.lock_url(root, version), WRITING_LEASE, f"the removal of {version}"):
        try:
            verified(root, version)
        except ArtefactError:
            storage.remove_marked(versions.version_url(root, version), versions.MANIFEST)


def _is_of_another_release(manifest: bytes) -> bool:
    try:
        schema_version = json.loads(manifest)["schema_version"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return False
    return isinstance(schema_version, int) and schema_version != versions.SCHEMA_VERSION
