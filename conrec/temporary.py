"""A temporary folder that goes with the object that owns it, and with the process where that ends first.

    path = folder_of(log, "conrec-log-")
    remove_all()      # before `os._exit`, which finalizes nothing

A process that is killed outright leaves its folders.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

_there: set[Path] = set()


def folder_of(owner: object, prefix: str) -> Path:
    """A new folder, which is removed with all that it holds when nothing refers to its owner, or Python exits."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    _there.add(path)
    weakref.finalize(owner, _remove, path)
    return path


def remove_all() -> None:
    """Removes every folder that is there, whoever still refers to its owner."""
    for path in list(_there):
        _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _there.discard(path)
