"""What lies under a store of blocklists: its pointers, its versions, and what is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from conrec.errors import ArtefactError
from conrec.serving import versions


@dataclass(frozen=True)
class Inventory:
    """What lies under a store of blocklists.

    `pointers`: the version that each names, None for one that names none; `manifests` of the complete versions, newest
    first; `damaged`: a sentence for each pointer or version that serving could not open, or that is gone.
    """

    pointers: dict[versions.Pointer, str | None]
    manifests: list[dict[str, Any]]
    not_complete: list[str]
    damaged: list[str]


def inventory(root: str) -> Inventory:
    """Looks at every pointer and version. Raises `ArtefactError` where nothing is published."""
    found = Inventory({}, [], [], [])
    for pointer in versions.POINTERS:
        try:
            document = versions.read_pointer(root, pointer)
        except ArtefactError as error:
            found.damaged.append(str(error))
            continue
        found.pointers[pointer] = None if document is None else document["version"]
        if document is not None:
            try:
                versions.complete_manifest(root, document["version"], document["manifest_sha256"])
            except ArtefactError as error:
                found.damaged.append(f"{versions.POINTERS[pointer]} names {document['version']}: {error}")
    for name in versions.version_names(root):
        try:
            complete = versions.read_manifest(root, name)
        except ArtefactError as error:
            found.damaged.append(str(error))
            continue
        if complete is None:
            found.not_complete.append(name)
        else:
            found.manifests.append(complete[0])
    if found.manifests and not any(found.pointers.values()) and not found.damaged:
        names = " and ".join(versions.POINTERS.values())
        found.damaged.append(f"{root}: {names} are gone; run conrec nightly again")
    if not (found.manifests or found.not_complete or found.damaged):
        raise ArtefactError(f"{root}: nothing is published; run conrec nightly first")
    found.manifests.sort(key=lambda manifest: datetime.fromisoformat(manifest["published_at"]), reverse=True)
    return found
