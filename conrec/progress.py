"""What a person sees while a stage runs: short lines and bars on the terminal, everything else in a log file.

    with quiet("runs/kuairand/logs/train.log"), progress("training", total=200) as bar:
        bar.advance(note="loss 1.23")

Invariant: inside `quiet`, whatever libraries, their worker processes or C code print to file descriptors 1 and 2
goes to the log; only `console` still writes where standard output went before. Without a terminal a bar is one
line at its start, one at its end and at most one a minute between.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from conrec import storage
from conrec.errors import StorageError

SILENT_SECONDS = 60.0
KEPT_BYTES = 16 << 20
"""Of the runs before, in a log on an object store, which is read and written whole."""

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Where this project talks to the person; libraries never write to it. What is printed is text as it stands, never
markup, in tables too: identifiers and paths may hold brackets. Styles are given beside the text."""

_display: Progress | None = None
_quiet = False


def warn(line: str) -> None:
    """One line that a person should read and need not act on."""
    console.print(f"  warning: {line}", style="yellow")


class Bar:
    """One running task."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.note = ""
        self._started = self._spoke = time.monotonic()
        self._task = _display.add_task(description, total=total, note="") if _display else None
        if self._task is None:
            console.print(f"{description} ...")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Moves on by `n`; `note` (a loss, a rate) stands beside the bar until the next one."""
        self.done += n
        self.note = note or self.note
        if self._task is not None and _display is not None:
            _display.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._spoke >= SILENT_SECONDS:
            self._spoke = time.monotonic()
            console.print(f"  {self._state()}")

    def _state(self) -> str:
        of = f" of {self.total:,}" if self.total is not None and self.total != self.done else ""
        # A task that counts nothing has only its time to tell.
        count = f": {self.done:,}{of}" if self.done or self.total is not None else ""
        note = f" · {self.note}" if self.note else ""
        return f"{self.description}{count} in {time.monotonic() - self._started:.1f} s{note}"

    def close(self, completed: bool) -> None:
        """Takes the bar away and leaves one line."""
        if self._task is not None and _display is not None:
            _display.remove_task(self._task)
        console.print(f"{'  ' if completed else '  stopped: '}{self._state()}")


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Bar]:
    """A bar for `total` pieces of work (None: unknown); bars may be nested."""
    global _display
    outermost = _display is None and console.is_terminal
    if outermost:
        # Redirecting standard output through rich would bring back the noise that `quiet` sends away.
        _display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        _display.start()
    bar = Bar(description, total)
    completed = False
    try:
        yield bar
        completed = True
    finally:
        bar.close(completed)
        if outermost and _display is not None:
            _display.stop()
            _display = None


@contextlib.contextmanager
def quiet(log: str | os.PathLike[str]) -> Iterator[None]:
    """Sends file descriptors 1 and 2 to the end of the file `log` (a path or URL); nested calls change nothing.

    A log on an object store is written to a local file first, which is put behind what it held when the block ends.
    """
    global _quiet
    if _quiet:
        yield
        return
    files, path = storage.filesystem(str(log))
    local = isinstance(files, LocalFileSystem)
    if local:
        target = Path(path)
    else:
        handle, name = tempfile.mkstemp(prefix="conrec-", suffix=".log")
        os.close(handle)
        target = Path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = {1: os.dup(1), 2: os.dup(2)}
    with open(target, "ab") as file:
        for descriptor in saved:
            os.dup2(file.fileno(), descriptor)
    # Where standard output is not descriptor 1 (a test that captures it, a notebook), the console keeps its own.
    ours = _is_descriptor_one(sys.stdout) and os.fdopen(os.dup(saved[1]), "w", encoding="utf-8", errors="replace")
    if ours:
        console.file = ours
    _quiet, failed = True, True
    try:
        yield
        failed = False
    finally:
        _quiet = False
        _flush()
        for descriptor, original in saved.items():
            os.dup2(original, descriptor)
            os.close(original)
        if ours:
            console.file = None  # type: ignore[assignment]  # rich's own default: whatever sys.stdout is at the time
            ours.close()
        if not local:
            written = target.read_bytes()
            target.unlink()
            # What went wrong in the block matters more than a log that cannot be kept.
            with contextlib.suppress(StorageError) if failed else contextlib.nullcontext():
                storage.write_bytes(str(log), _end_of(str(log)) + written)


def _end_of(log: str) -> bytes:
    """The last KEPT_BYTES of a log, none where it has not begun: stores append to no file."""
    try:
        return storage.read_bytes(log)[-KEPT_BYTES:]
    except FileNotFoundError:
        return b""


def _is_descriptor_one(stream: object) -> bool:
    try:
        return bool(stream.fileno() == 1)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()
