"""The arrays of conrec/serving/compile.py as one file of a version: made once by its publisher, downloaded by mirrors.

    about = pack({"data": entries, "rules": entries}, folder)      # folder/compiled.zst; manifest["compiled"]
    shapes = download(root, manifest, folder)                      # the entries of the arrays, now files of the folder

    <root>/versions/<version>/compiled.zst      all arrays one behind the other, by shape and name, as one zstd stream

Invariant: what is downloaded is what `in_files` makes of the version's rows, to the byte: the file is held against its
digest before anything is taken from it, and each array against its own. A version without it, or with that of another
format, is compiled where it is mirrored.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from conrec import storage
from conrec.errors import ArtefactError
from conrec.serving import versions
from conrec.serving.compile import FORMAT, Files
from conrec.serving.rows import SCHEMAS

Shapes = dict[str, dict[str, dict[str, Any]]]
"""Shape -> array -> its entry: `file`, `type`, `bytes`, `sha256`."""
_REMEDY = "roll back to another version"
_AT_ONCE = 1 << 24
_TYPE = re.compile(r"[<|][iuf][1248]")
_NAME = re.compile(r"[a-z_]+")


def pack(shapes: Shapes, folder: Path) -> dict[str, Any]:
    """Moves the arrays that lie in a folder into one file there; returns what the manifest says of it."""
    packed = folder / versions.COMPILED
    with pa.OSFile(str(packed), "wb") as sink, pa.CompressedOutputStream(sink, "zstd") as stream:
        names = sorted((shape, name) for shape, entries in shapes.items() for name in entries)
        for path in [folder / shapes[shape][name]["file"] for shape, name in names]:
            with path.open("rb") as file:
                while block := file.read(_AT_ONCE):
                    stream.write(block)
            path.unlink()
    return {
        "format": FORMAT,
        "bytes": packed.stat().st_size,
        "sha256": storage.sha256(str(packed)),
        "shapes": shapes,
    }


def download(root: str, manifest: dict[str, Any], folder: Path) -> Shapes | None:
    """Writes the arrays of a version below `folder`, as `in_files` does; None where it has none of this format.

    Raises `ArtefactError` where the file is missing or damaged.
    """
    about = manifest.get("compiled")
    if about is None or about["format"] != FORMAT:
        return None
    url = versions.compiled_url(root, manifest["version"])
    if not _is_known(about.get("shapes")):
        raise ArtefactError(f"{url}: damaged: the manifest does not say which arrays it holds; {_REMEDY}")
    packed = folder / versions.COMPILED
    versions.fetch_compiled(root, manifest, packed)
    with pa.OSFile(str(packed), "rb") as source, pa.CompressedInputStream(source, "zstd") as stream:
        shapes = {
            shape: _unpacked(stream, entries, shape, folder) for shape, entries in sorted(about["shapes"].items())
        }
    packed.unlink()
    if shapes != about["shapes"]:
        raise ArtefactError(f"{url}: damaged: it holds other arrays than the manifest says; {_REMEDY}")
    return shapes


def _unpacked(stream: Any, entries: dict[str, dict[str, Any]], shape: str, folder: Path) -> dict[str, dict[str, Any]]:
    files = Files(folder, shape)
    for name, entry in sorted(entries.items()):
        files.append(name, np.empty(0, entry["type"]))
        left = entry["bytes"]
        while left and (block := stream.read(min(left, _AT_ONCE))):
            files.append(name, np.frombuffer(block, np.uint8))
            left -= len(block)
    return files.entries()


def _is_known(shapes: object) -> bool:
    """Whether these are arrays that lie in the mirror's folder."""
    return (
        isinstance(shapes, dict)
        and shapes.keys() == SCHEMAS.keys()
        and all(
            isinstance(entries, dict)
            and all(
                _NAME.fullmatch(name)
                and isinstance(entry, dict)
                and entry.keys() == {"file", "type", "bytes", "sha256"}
                and entry["file"] == f"{shape}.{name}"
                and isinstance(entry["type"], str)
                and _TYPE.fullmatch(entry["type"])
                and isinstance(entry["bytes"], int)
                and entry["bytes"] >= 0
                for name, entry in entries.items()
            )
            for shape, entries in shapes.items()
        )
    )
