"""How long something took in all, over every run that was killed before it was done.

    with spent(artefact.url, ".spent.json") as seconds:
        ...
        total = seconds()

The hidden file holds the seconds of the runs before, and of this one every now and then: a kill loses that little. It
is written where the work has left something: what was refused leaves no folder.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from conrec import storage
from conrec.errors import DataError

SAVE_SECONDS = 10.0


@contextlib.contextmanager
def spent(folder: str, name: str, save_seconds: float = SAVE_SECONDS) -> Iterator[Callable[[], float]]:
    """Yields a clock that goes on from where the last run with this file ended."""
    url = storage.join(folder, name)
    before, began, done = _seconds(url), time.perf_counter(), threading.Event()

    def total() -> float:
        return before + time.perf_counter() - began

    def save() -> None:
        # A store that fails here fails the work too, which says so.
        with contextlib.suppress(OSError):
            if storage.exists(folder):
                storage.write_json(url, {"seconds": round(total(), 1)})

    def keep_saving() -> None:
        while not done.wait(save_seconds):
            save()

    saver = threading.Thread(target=keep_saving, daemon=True)
    saver.start()
    try:
        yield total
    finally:
        done.set()
        saver.join()
        save()


def _seconds(url: str) -> float:
    try:
        return float(storage.read_json(url)["seconds"])
    except (FileNotFoundError, DataError, KeyError, TypeError, ValueError):
        return 0.0
