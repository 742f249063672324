"""Tells a program that a stage failed: `nightly.on_failure`.

    with telling(config.nightly.on_failure, "nightly", log):
        ...                     # an exception: the command runs, then it goes on its way as it was

The command is a list of words, started without a shell, so that no word of an error is ever part of a command line. On
its standard input stands the message, a traceback where it is a defect; in its environment CONREC_STAGE, CONREC_ERROR
(`AuditError`, or another class) and CONREC_LOG. Invariant: whatever becomes of the command, the error of the stage is
what is raised. After TELLING_SECONDS it is ended, with all that it started; what one that ends before leaves in the
background goes on. Ctrl-C and SIGTERM are no failure, and end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import traceback
from collections.abc import Iterator, Sequence

from conrec.errors import ConrecError
from conrec.progress import warn

TELLING_SECONDS = 60.0


@contextlib.contextmanager
def telling(command: Sequence[str], stage: str, log: str, seconds: float = TELLING_SECONDS) -> Iterator[None]:
    """Runs the command where the block raises an error, and raises that error; without a command it only raises."""
    try:
        yield
    except Exception as error:
        if command:
            _tell(
                command,
                error,
                {"CONREC_STAGE": stage, "CONREC_ERROR": type(error).__name__, "CONREC_LOG": log},
                seconds,
            )
        raise


def _tell(command: Sequence[str], error: Exception, told: dict[str, str], seconds: float) -> None:
    text = str(error) if isinstance(error, ConrecError) else "".join(traceback.format_exception(error))
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | told, start_new_session=True)
    except (OSError, ValueError) as why:
        warn(f"nightly.on_failure: {command[0]} does not start: {why}")
        return
    try:
        process.communicate(text.encode(errors="replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(process)
        warn(f"nightly.on_failure: {command[0]} is ended after {seconds:g} s")
        return
    except BaseException:
        _kill(process)
        raise
    if code := process.returncode:
        how = f"with code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
        warn(f"nightly.on_failure: {command[0]} ended {how}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
