"""The compiled form of a version, written by its publisher so that no serving machine has to make it.

    manifest = with_compiled(root, manifest, lock.renew)     # before the manifest is created

Invariant: it is made of the files that the manifest names, each verified as it is read, and was read back and found
right when this returns. It takes the arrays' size on the local disk (`TMPDIR`), and memory for the buckets that
`mapped` holds. Buckets are compiled wherever `mapped` does it; here they are joined, packed and stored.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from conrec import storage
from conrec.parallel import Mapped, in_process
from conrec.serving import versions
from conrec.serving.compile import Bucket, Files, Rows, compile_bucket, join
from conrec.serving.packed import pack
from conrec.serving.rows import SCHEMAS

SILENCE = 60.0
"""Seconds that may pass until the next sign of life, much less than a lease."""


def with_compiled(
    root: str, manifest: dict[str, Any], renew: Callable[[], None], mapped: Mapped = in_process
) -> dict[str, Any]:
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

    def living(buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        for bucket in buckets:
            alive()
            yield bucket

    with tempfile.TemporaryDirectory(prefix="conrec-compiled-") as name:
        folder, count = Path(name), manifest["buckets"]
        shapes = {}
        for shape in SCHEMAS:
            # Workers of a cluster start elsewhere.
            version, files = Rows(storage.absolute(root), manifest, shape), Files(folder, shape, safely=False)
            made = mapped(compile_bucket, version, range(count), f"buckets of {shape} compiled", count)
            with closing(made) as buckets:
                join(version, living(buckets), files)
            shapes[shape] = files.entries()
        about = pack(shapes, folder)
        alive()
        storage.put_file(folder / versions.COMPILED, versions.compiled_url(root, manifest["version"]))
    alive()
    compiled = manifest | {"compiled": about}
    versions.require_compiled(root, compiled)
    return compiled
