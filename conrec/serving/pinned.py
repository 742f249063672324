"""Opening the version that a pointer or a caller names and staying with it: what both readers share.

Invariant: a version is opened whole, verified against its manifest, and then takes the place of the one before by one
assignment: a request that took hold of one asks that one to its end.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from conrec.errors import ArtefactError
from conrec.location import located
from conrec.serving import mirror, versions
from conrec.serving.compile import in_memory
from conrec.serving.lookup import Compiled
from conrec.serving.shards import Shard

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_TRIES = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pinned:
    """One verified version; never changed after it was made."""

    identity: tuple[str, ...]
    """Differs wherever something else would be opened."""
    name: str
    watermark: datetime
    published_at: datetime
    about: dict[str, Any]
    """What the manifest says of the night."""
    compiled: Compiled


class PinnedReader:
    """A reader of one shape of the version that a pointer names, or of `version`; the base of the readers."""

    _shape: str

    def __init__(
        self,
        root: str,
        pointer: versions.Pointer,
        clock: Callable[[], datetime],
        refresh_every: timedelta | None,
        version: str | None,
        shard: str | None,
    ) -> None:
        if pointer not in versions.POINTERS:
            raise ArtefactError(f"pointer {pointer!r} is unknown; name one of {', '.join(versions.POINTERS)}")
        self._root = located(root)
        self._pointer = pointer
        self._named = version
        self._shard = None if shard is None else Shard.of(shard)
        self._clock = clock
        self._refreshing = threading.Lock()
        self._closed = threading.Event()
        self._pinned = self._open(None)
        if refresh_every is not None and version is None:
            arguments = (weakref.ref(self), self._closed, refresh_every.total_seconds())
            threading.Thread(target=_keep_fresh, args=arguments, name="conrec-refresh", daemon=True).start()

    def refresh(self) -> bool:
        """Pins the version that the pointer names now; returns whether it is another one.

        A reader of a named version stays with it: always False.
        Raises `ArtefactError` when the newer one is damaged; the reader goes on with the last good one.
        """
        if self._named is not None:
            return False
        # One at a time: a slow one must not put its version over the newer one of a fast one.
        with self._refreshing:
            newer = self._open(self._pinned)
            changed = newer is not self._pinned
            self._pinned = newer
            return changed

    def close(self) -> None:
        """Ends the refreshing in the background; the reader can still be asked."""
        self._closed.set()

    @property
    def version(self) -> str:
        """Name of the pinned version."""
        return self._pinned.name

    @property
    def watermark(self) -> datetime:
        """Time until which interactions went into the pinned version."""
        return self._pinned.watermark

    def holds(self, user_id: str) -> bool:
        """Whether the user belongs to the shard that is open; every user where none was named."""
        return self._shard is None or self._shard.holds(user_id)

    @property
    def about(self) -> dict[str, Any]:
        """What the manifest of the pinned version says of its night, its audience for example."""
        return self._pinned.about

    def age(self) -> timedelta:
        """Time since the pinned version was published."""
        return self._clock() - self._pinned.published_at

    def _now_us(self) -> int:
        return (self._clock() - EPOCH) // _MICROSECOND

    def _open(self, pinned: Pinned | None) -> Pinned:
        """The version that was named, else the pointer's: `pinned` itself when it is that one."""
        if mirror.is_mirror(self._root):
            return _from_mirror(Path(self._root), self._pointer, self._named, self._shape, self._shard, pinned)
        if self._named is not None:
            return _named(self._root, self._named, self._shape, self._shard)
        return _from_store(self._root, self._pointer, self._shape, self._shard, pinned)


def _keep_fresh(reference: weakref.ref[PinnedReader], closed: threading.Event, seconds: float) -> None:
    while not closed.wait(seconds):
        reader = reference()
        if reader is None:
            return
        try:
            reader.refresh()
        except Exception as error:  # of any store's client; a request must not notice, the age says it
            _log.warning("goes on with version %s: %s", reader.version, error)
        del reader


def _from_store(root: str, pointer: versions.Pointer, shape: str, shard: Shard | None, pinned: Pinned | None) -> Pinned:
    def opened(named: dict[str, Any]) -> Pinned:
        identity = (named["version"], named["manifest_sha256"])
        if pinned is not None and pinned.identity == identity:
            return pinned
        manifest = versions.pointed_manifest(root, named)
        return _pin(identity, manifest, Compiled(in_memory(root, manifest, shape, shard)))

    return versions.following(root, pointer, opened)


def _named(root: str, version: str, shape: str, shard: Shard | None) -> Pinned:
    manifest, digest = versions.complete_manifest(root, version)
    return _pin((version, digest), manifest, Compiled(in_memory(root, manifest, shape, shard)))


def _require_mirrored(
    folder: Path, state: dict[str, Any], pointer: versions.Pointer, version: str | None, shard: Shard | None
) -> None:
    """Raises `ArtefactError` unless the mirror has the version, or where None is named follows the pointer, and has the
    users of the shard: a reader who took some for all would block nothing for the others."""
    if version is None and state["pointer"] != pointer:
        raise ArtefactError(f"{folder}: mirrors the pointer {state['pointer']}, not {pointer}; open it with that one")
    if version is not None and state["version"] != version:
        store = state.get("source", "the store that it mirrors")
        raise ArtefactError(f"{folder}: mirrors version {state['version']}, not {version}; open that one from {store}")
    if mirror.shard_of(state) != shard:
        has, wanted = Shard.told(mirror.shard_of(state)), Shard.told(shard)
        raise ArtefactError(f"{folder}: mirrors {has}, not {wanted}; open it with shard={state.get('shard')!r}")


def _from_mirror(
    folder: Path,
    pointer: versions.Pointer,
    version: str | None,
    shape: str,
    shard: Shard | None,
    pinned: Pinned | None,
) -> Pinned:
    for left in reversed(range(_TRIES)):
        state = mirror.read_state(folder)
        _require_mirrored(folder, state, pointer, version, shard)
        identity = (state["version"], state["manifest_sha256"], state["folder"])
        if pinned is not None and pinned.identity == identity:
            return pinned
        try:
            index = mirror.read_index(folder, state)
            arrays = mirror.open_arrays(folder, state, index, shape)
        except FileNotFoundError as error:
            # Flipped twice since the state was read, and removed: the state names another one by now.
            if left:
                continue
            raise ArtefactError(f"{folder}: damaged: {error}; delete the folder and mirror again") from None
        return _pin(identity, index["manifest"], Compiled(arrays))
    raise AssertionError


def _pin(identity: tuple[str, ...], manifest: dict[str, Any], compiled: Compiled) -> Pinned:
    try:
        published_at = datetime.fromisoformat(manifest["published_at"]).astimezone(UTC)
    except ValueError as error:
        raise ArtefactError(f"manifest of {manifest['version']}: published_at: {error}; roll back") from None
    about = manifest["about"]
    watermark = EPOCH + timedelta(microseconds=about["watermark_us"])
    return Pinned(identity, manifest["version"], watermark, published_at, about, compiled)
