"""Ctrl-C and SIGTERM end a run within ten seconds, whatever it is doing, and leave no process behind.

    with Interruption() as interruption:
        ...                     # the first signal raises `Interrupted` here
        interruption.leave()    # where `interruption.number` is not None: Ray stops, a line says how to go on

The exception unwinds what Python can unwind. A thread looks on, because the main one may be inside a library that calls
no Python for minutes, or one that has put a handler of its own in the place of ours, as Ray and Ray Train do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from conrec import temporary
from conrec.progress import console

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 6.0
"""Then the process ends without unwinding any further. Everything it writes is whole or not there."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this run to end. The kind that Ray lets out of its waiting, as it does no other."""


class Interruption:
    """Handles the signals of the main thread inside a block."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that has come."""
        self._raised = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets no other thread handle signals
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        if self.number is None:
            os.write(self._writing, b"\0")
            self._watcher.join()
            os.close(self._reading)
            os.close(self._writing)

    def leave(self) -> NoReturn:
        """Stops Ray, says how to go on, and ends the process with 128 and the number of the signal."""
        assert self.number is not None
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()
        print(_farewell(self.number), file=sys.stderr)
        _end(self.number)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._raised:  # once: what unwinds is not struck again
            self._raised = True
            self.number = number
            raise Interrupted

    def _watch(self) -> None:
        """Every signal writes its number to the pipe, at once and from C, whoever handles it."""
        while (number := os.read(self._reading, 1)[0]) not in SIGNALS:
            if not number:
                return
        self.number = number
        time.sleep(GRACE_SECONDS)
        console.print(_farewell(number), markup=False)
        _end(number)


def _end(number: int) -> NoReturn:
    """At once, with all that was started: what libraries do at a regular exit takes seconds, and may never end."""
    for process in [*_descendants(os.getpid())]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    temporary.remove_all()  # what frames on their way out still hold: a log is personal data
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(128 + number)


def _farewell(number: int) -> str:
    return f"stopped by {signal.Signals(number).name}; run the same command again: it goes on where it was"


def _descendants(process: int) -> Iterator[int]:
    """Its children and theirs; none where the system does not tell (not Linux)."""
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, file.read_text().split()):
                yield child
                yield from _descendants(child)
