"""A copy of the published version on the disk of a serving machine, compiled so that it opens at once.

    mirror("s3://bucket/blocklists", "/var/lib/conrec")        # conrec mirror s3://bucket/blocklists /var/lib/conrec
    BlocklistReader("/var/lib/conrec")
    mirror("s3://bucket/blocklists", "/var/lib/conrec", shard=Shard(3, 16))     # those users, from their files alone

    <folder>/MIRROR.json                                 names what readers open; the only file that ever changes
    <folder>/mirrored/<version>-<random>/index.json      the manifest of the version, and every array with its digest
    <folder>/mirrored/<version>-<random>/data.*, rules.* the arrays of conrec/serving/compile.py

The arrays are downloaded as the publisher compiled them; those of a version that has none of this format are compiled
here, which a warning says. So are those of a shard: its files are a fraction of what would be downloaded.

Invariant: what MIRROR.json names is whole: every file that was read of the store is as its manifest says, every
array was written, read back and found as the index says, before MIRROR.json was replaced. Whatever fails, the one
before stays. It is kept after the flip too, for readers that are about to open it, unless the store has it no more.
Whatever else lies beside it, of a process that was killed, goes before anything is downloaded. One process at a time
mirrors into a folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from conrec import storage
from conrec.errors import ArtefactError, ConrecError
from conrec.location import located
from conrec.serving import versions
from conrec.serving.compile import FORMAT, in_files, map_files
from conrec.serving.packed import download
from conrec.serving.rows import SCHEMAS
from conrec.serving.shards import Shard

STATE = "MIRROR.json"
_log = logging.getLogger(__name__)
_INDEX = "index.json"
_COPY = ("version", "manifest_sha256", "folder")
"""What names a copy."""
_REMEDY = "delete the folder and mirror again"


def mirror(source: str, folder: str, pointer: versions.Pointer = "current", shard: Shard | None = None) -> bool:
    """Brings `folder` to the version that the pointer of the store `source` names; returns whether it was another one.

    With `shard` only the rows of its users are there.
    A copy that is there already is verified, and made anew when it is damaged.
    Raises `ArtefactError` when nothing is published, something is damaged, the disk fails, or the folder serves
    something else; readers go on with what was mirrored before.
    """
    folder = located(folder)
    if "://" in folder:
        raise ArtefactError(f"{folder}: a mirror lies on the local disk; name a local folder")
    place = Path(folder)
    if versions_lie_in(place):
        raise ArtefactError(f"{folder}: is itself a published store; name another folder for the mirror")
    try:
        with _alone(place):
            return versions.following(source, pointer, lambda named: _mirror(source, place, pointer, shard, named))
    except OSError as error:
        raise ArtefactError(f"{folder}: not mirrored: {error}; readers go on with what was mirrored before") from None


def follow(
    source: str,
    folder: str,
    pointer: versions.Pointer,
    shard: Shard | None,
    every: float,
    say: Callable[[str], None],
) -> None:
    """Mirrors every so many seconds, for ever. What fails is said and tried again: a mirror outlives its network.

    A folder that was deleted is made anew in the next round. A damaged copy is not, until the pointer moves: a round
    before that reads no array.
    """
    seen = None
    while True:
        try:
            named = versions.read_pointer(source, pointer)
            if named is None or named != seen or not is_mirror(located(folder)):
                changed = mirror(source, folder, pointer, shard)
                say(f"{folder}: {'now' if changed else 'at'} {mirrored_version(folder)}")
                seen = named
        except ConrecError as error:
            say(str(error))
        except Exception as error:  # whatever the client of an object store raises
            say(f"{source}: {type(error).__name__}: {error}")
        time.sleep(every)


def is_mirror(folder: str) -> bool:
    """Whether `folder` was made by `mirror`."""
    return "://" not in folder and os.path.exists(os.path.join(folder, STATE))


def mirrored_version(folder: str) -> str:
    """Name of the version that readers of the folder open."""
    return str(read_state(Path(located(folder)))["version"])


def read_state(folder: Path) -> dict[str, Any]:
    """What MIRROR.json says. Raises `ArtefactError` when it is damaged."""
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtefactError(f"{path}: damaged: not JSON ({error}); {_REMEDY}") from None
    if not _has_texts(state, "pointer", *_COPY, "index_sha256") or not _has_texts(state.get("before", state), *_COPY):
        raise ArtefactError(f"{path}: damaged: fields are missing; {_REMEDY}")
    if "shard" in state and not isinstance(state["shard"], str):
        raise ArtefactError(f"{path}: damaged: {state['shard']!r} is no shard; {_REMEDY}")
    if os.path.basename(state["folder"]) != state["folder"] or state["folder"] in ("", ".", ".."):
        raise ArtefactError(f"{path}: damaged: {state['folder']!r} is no folder of a mirror; {_REMEDY}")
    return state


def _has_texts(document: Any, *names: str) -> bool:
    return isinstance(document, dict) and all(isinstance(document.get(name), str) for name in names)


def shard_of(state: dict[str, Any]) -> Shard | None:
    """Whose rows a mirror has, of what `read_state` returns; None for all."""
    return Shard.of(state["shard"]) if "shard" in state else None


def require_source(folder: Path, state: dict[str, Any], source: str) -> None:
    """Raises `ArtefactError` where a mirror, of what `read_state` returns, is one of another store than `source`."""
    has, wanted = (storage.absolute(url).rstrip("/") for url in (state.get("source", source), source))
    if has != wanted:
        raise ArtefactError(
            f"{folder}: mirrors {has}; name another folder for {wanted}, or delete this one where the store has moved"
        )


def read_index(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The index of what `state` names: `manifest`, and `shapes` with the arrays of each.

    Raises `ArtefactError` when it is damaged or of another format, `FileNotFoundError` when it is gone.
    """
    path = folder / "mirrored" / state["folder"] / _INDEX
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != state["index_sha256"]:
        raise ArtefactError(f"{path}: damaged: SHA-256 {digest}, {STATE} says {state['index_sha256']}; {_REMEDY}")
    index: dict[str, Any] = json.loads(data)
    if index["format"] != FORMAT:
        raise ArtefactError(f"{path}: format {index['format']}, this release reads {FORMAT}; mirror again with it")
    return index


def open_arrays(folder: Path, state: dict[str, Any], index: dict[str, Any], shape: str) -> dict[str, np.ndarray]:
    """Verifies and maps the arrays of a shape. Raises `ArtefactError` when one is damaged."""
    return map_files(folder / "mirrored" / state["folder"], index["shapes"][shape])


def versions_lie_in(folder: Path) -> bool:
    """Whether the folder is a store that was published to."""
    return any((folder / name).exists() for name in versions.POINTERS.values())


def _mirror(source: str, folder: Path, pointer: versions.Pointer, shard: Shard | None, named: dict[str, Any]) -> bool:
    version, digest = named["version"], named["manifest_sha256"]
    before = _state_or_none(folder)
    if before is not None:
        require_source(folder, before, source)
    if before is not None and before["pointer"] != pointer:
        raise ArtefactError(f"{folder}: mirrors the pointer {before['pointer']}; name another folder for {pointer}")
    if before is not None and shard_of(before) != shard:
        has = Shard.told(shard_of(before))
        raise ArtefactError(f"{folder}: mirrors {has}; name another folder for {shard or 'all'}")
    _remove_all_but(folder, _readers_may_open(source, before))
    same = before is not None and (before["version"], before["manifest_sha256"]) == (version, digest)
    if before is not None and same and _is_sound(folder, before):
        return False
    manifest = versions.pointed_manifest(source, named)
    name = f"{version}-{uuid.uuid4().hex[:12]}"
    made = folder / "mirrored" / name
    try:
        made.mkdir(parents=True)
        shapes = None if shard is not None else download(source, manifest, made)
        if shapes is None and shard is None:
            _log.warning("%s: version %s has no compiled form of format %d: compiled here", source, version, FORMAT)
        if shapes is None:
            shapes = {shape: in_files(source, manifest, shape, made, shard) for shape in SCHEMAS}
        index = {"format": FORMAT, "manifest": manifest, "shapes": shapes}
        storage.write_json(str(made / _INDEX), index)
        state = {
            "pointer": pointer,
            "version": version,
            "manifest_sha256": digest,
            "folder": name,
            "index_sha256": storage.sha256(str(made / _INDEX)),
            "source": storage.absolute(source),
            "mirrored_at": datetime.now(UTC).isoformat(timespec="microseconds"),
        }
        if shard is not None:
            state["shard"] = str(shard)
        if before is not None and not same:
            state["before"] = {name: before[name] for name in _COPY}
        for shape in SCHEMAS:
            open_arrays(folder, state, read_index(folder, state), shape)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    storage.write_json(str(folder / STATE), state)
    _remove_all_but(folder, _readers_may_open(source, state))
    return before is None or before["version"] != version


def _readers_may_open(source: str, state: dict[str, Any] | None) -> set[str]:
    """The copy that MIRROR.json names, and the one before: a reader that read it a moment ago is about to open that."""
    if state is None:
        return set()
    before = state.get("before")
    return {state["folder"]} | ({before["folder"]} if before is not None and _is_published(source, before) else set())


def _remove_all_but(folder: Path, kept: set[str]) -> None:
    copies = folder / "mirrored"
    for copy in copies.iterdir() if copies.exists() else ():
        if copy.name not in kept:
            # Readers that have it open keep their mapping.
            shutil.rmtree(copy, ignore_errors=True)


def _is_published(source: str, state: dict[str, Any]) -> bool:
    """Whether the store still has what was copied: a version that it took back must be gone here as well."""
    try:
        complete = versions.read_manifest(source, state["version"])
    except (ArtefactError, OSError):
        return False
    return complete is not None and complete[1] == state["manifest_sha256"]


def _state_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return read_state(folder)
    except (FileNotFoundError, ArtefactError):
        return None


def _is_sound(folder: Path, state: dict[str, Any]) -> bool:
    try:
        index = read_index(folder, state)
        for shape in SCHEMAS:
            open_arrays(folder, state, index, shape)
    except (ArtefactError, OSError):
        return False
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel gives back however this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtefactError(f"{folder}: another process mirrors into this folder; let it finish") from None
        yield
