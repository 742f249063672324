"""A lock object on a store: one holder at a time, also when a holder dies.

    with Lock(url, lease=timedelta(minutes=15), holder="publishing v7") as lock:
        ...
        lock.renew()        # before everything that only the holder may do
    with Lock(...) as lock, lock.renewing():        # or by itself, where nobody knows how long the work takes

The object is created exclusively and removed at the end. It is abandoned, and the next publisher breaks it, once its
lease is over (the machines' clocks must agree to well below a lease), or when its process has ended on this machine.
A holder that slept past its lease learns from `renew` that it lost the lock; between that look and the write that
follows there is no guard but the store's own, which is why the manifest is created exclusively and a pointer compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from conrec import storage
from conrec.errors import PublishError

_PAUSE_SECONDS = 0.05
RENEWALS = 8
"""Of a lease that begins anew by itself: a store that fails for half of it loses no lock."""
_held: set[str] = set()
"""Tokens of the locks that this process holds: one of ours that is not here was left by a failure."""


def _machine() -> str | None:
    """This boot of this machine and its process IDs' namespace; None where that is not known (not Linux)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


class Lock:
    """Holds the object at `url` while the block runs.

    `wait`: until another holder is done or its lease is over, instead of raising `PublishError` that names it.
    """

    def __init__(self, url: str, lease: timedelta, holder: str, wait: bool = False) -> None:
        self._url, self._lease, self._holder, self._wait = url, lease, holder, wait
        self._token = uuid.uuid4().hex
        self._since = 0.0

    def __enter__(self) -> Lock:
        _held.add(self._token)  # first: another thread may see the object before this one goes on
        try:
            while not self._take():
                time.sleep(_PAUSE_SECONDS)
        except BaseException:
            _held.discard(self._token)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What cannot be removed is abandoned from here on; the work inside is done, or its own error matters more.
        with contextlib.suppress(OSError):
            if (held := _read(self._url)) is not None and _token(held) == self._token:
                _remove(self._url)
        _held.discard(self._token)

    def renew(self) -> None:
        """Begins the lease anew. Raises `PublishError` when the lock was lost to another holder."""
        self.check()
        storage.write_bytes(self._url, self._document())

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Begins the lease anew again and again while the block runs.

        Who may have lost the lock meanwhile asks `check`; an error of the block is `PublishError` then, since what the
        other holder did may be its cause.
        """
        done = threading.Event()

        def renew() -> None:
            while not done.wait(self._lease.total_seconds() / RENEWALS):
                try:
                    self.renew()
                except PublishError:
                    return
                except OSError:
                    continue  # a store that fails for long fails the work too, which says so

        renewer = threading.Thread(target=renew, daemon=True)
        renewer.start()
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):
                self.check()
            raise
        finally:
            done.set()
            renewer.join()

    def check(self) -> None:
        """Raises `PublishError` when the lock was lost to another holder."""
        held = _read(self._url)
        if held is None or _token(held) != self._token:
            raise PublishError(
                f"{self._url}: {describe(held)} took over from {self._holder}, which was silent for longer than its "
                f"lease of {self._lease}; nothing was published, run again"
            )

    def _take(self) -> bool:
        self._since = time.time()
        try:
            storage.create_bytes(self._url, self._document())
        except FileExistsError:
            held = _read(self._url)
            if held is None:
                return False  # released meanwhile
            if _token(held) != self._token:  # else it is ours: the store answered late, and the put was tried again
                if is_abandoned(held):
                    _break(self._url, held)
                elif not self._wait:
                    raise PublishError(f"{self._url}: held by {describe(held)}; run again when it is done") from None
                return False
        return True

    def _document(self) -> bytes:
        document = {
            "token": self._token,
            "holder": self._holder,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": self._since,
            "taken_at": time.time(),
            "lease_seconds": self._lease.total_seconds(),
        }
        return json.dumps(document, indent=2).encode() + b"\n"


def is_abandoned(held: bytes) -> bool:
    """Whether the lease of a lock object is over, or its process has ended; a damaged one is nobody's."""
    lock = _parse(held)
    if lock is None or abs(time.time() - lock["taken_at"]) > lock["lease_seconds"]:
        return True
    if lock["machine"] is None or lock["machine"] != _machine():
        return False
    if lock["pid"] == os.getpid():
        return lock["token"] not in _held
    try:
        os.kill(lock["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and belongs to somebody else
    return False


def remove_abandoned(url: str) -> bool:
    """Removes a lock object if it is abandoned; returns whether it did."""
    held = _read(url)
    if held is None or not is_abandoned(held):
        return False
    return _break(url, held)


def describe(held: bytes | None) -> str:
    """Who holds a lock, in words."""
    lock = None if held is None else _parse(held)
    if lock is None:
        return "another publisher"
    since, sign = (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(lock[key])) for key in ("since", "taken_at"))
    return (
        f"{lock['holder']} (host {lock['host']}, process {lock['pid']}, since {since}, "
        f"for at most {lock['lease_seconds']:.0f} s more than its last sign at {sign})"
    )


def _break(url: str, held: bytes) -> bool:
    # Another publisher may have broken it too and hold its own by now. One that it hits in between these two steps
    # learns of that by `check`, before it writes anything that matters.
    if _read(url) != held:
        return False
    _remove(url)
    return True


def _remove(url: str) -> None:
    files, path = storage.filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        files.rm_file(path)


def _read(url: str) -> bytes | None:
    try:
        return storage.read_bytes(url)
    except FileNotFoundError:
        return None


def _token(held: bytes) -> str | None:
    lock = _parse(held)
    return None if lock is None else str(lock["token"])


def _parse(held: bytes) -> dict[str, Any] | None:
    """The document of a lock, or None when it is damaged."""
    try:
        lock = json.loads(held)
    except (ValueError, RecursionError):
        return None
    kinds = {"token": str, "holder": str, "host": str, "pid": int}
    kinds |= {"since": float, "taken_at": float, "lease_seconds": float}
    if not isinstance(lock, dict):
        return None
    lock.setdefault("since", lock.get("taken_at"))  # an older release does not tell it
    if not all(isinstance(lock.get(key), kind) for key, kind in kinds.items()):
        return None
    return lock if 0 < lock["pid"] < 1 << 31 and isinstance(lock.get("machine"), str | None) else None
