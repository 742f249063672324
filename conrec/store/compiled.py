"""The compiled form of a version, written by its publisher so that no serving machine has to make it.

    manifest = with_compiled(root, manifest, lock.renew)     # before the manifest is created

Invariant: it is made of the files that the manifest names, each verified as it is read, and was read back and found
right when this returns. It takes the arrays' size on the local disk (`TMPDIR`), and memory for one bucket.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conrec import storage
from conrec.serving import versions
from conrec.serving.compile import in_files
from conrec.serving.packed import pack
from conrec.serving.rows import SCHEMAS


def with_compiled(root: str, manifest: dict[str, Any], renew: Callable[[], None]) -> dict[str, Any]:
    """Writes compiled.zst of a version whose rows are written; returns the manifest that names it.

    `renew` is called for every bucket: nobody may take the version over meanwhile.
    Raises `ArtefactError` where a file is not what the manifest says.
    """
    with tempfile.TemporaryDirectory(prefix="conrec-compiled-") as name:
        folder = Path(name)
        about = pack({shape: in_files(root, manifest, shape, folder, renew) for shape in SCHEMAS}, folder)
        renew()
        storage.put_file(folder / versions.COMPILED, versions.compiled_url(root, manifest["version"]))
    renew()
    compiled = manifest | {"compiled": about}
    versions.require_compiled(root, compiled)
    return compiled
