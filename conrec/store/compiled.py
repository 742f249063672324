"""The compiled form of a version, written by its publisher so that no serving machine has to make it.

    manifest = with_compiled(root, manifest, lock.renew)     # before the manifest is created

Invariant: it is made of the files that the manifest names, each verified as it is read, and was read back and found
right when this returns. It takes the arrays' size on the local disk (`TMPDIR`), and memory for one bucket.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conrec import storage
from conrec.serving import versions
from conrec.serving.compile import Files, compile_rows
from conrec.serving.packed import pack
from conrec.serving.rows import SCHEMAS

SILENCE = 60.0
"""Seconds that may pass until the next sign of life, much less than a lease."""


def with_compiled(root: str, manifest: dict[str, Any], renew: Callable[[], None]) -> dict[str, Any]:
    """Writes compiled.zst of a version whose rows are written; returns the manifest that names it.

    `renew` is called between buckets once a minute: nobody may take the version over meanwhile.
    Raises `ArtefactError` where a file is not what the manifest says.
    """
    said = time.monotonic()

    def alive() -> None:
        nonlocal said
        if time.monotonic() - said > SILENCE:
            renew()
            said = time.monotonic()

    with tempfile.TemporaryDirectory(prefix="conrec-compiled-") as name:
        folder = Path(name)
        shapes = {}
        for shape in SCHEMAS:
            files = Files(folder, shape, safely=False)
            compile_rows(root, manifest, shape, files, alive)
            shapes[shape] = files.entries()
        about = pack(shapes, folder)
        alive()
        storage.put_file(folder / versions.COMPILED, versions.compiled_url(root, manifest["version"]))
    alive()
    compiled = manifest | {"compiled": about}
    versions.require_compiled(root, compiled)
    return compiled
