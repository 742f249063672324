"""`conrec mirror` of a version that its publisher compiled, against one that every serving machine compiles.

The version is that of benchmarks/reader.py, on the local disk, so that a download is a copy: over a network it takes
the bytes' time on top, for either. Both ways take turns in one run, each into an empty folder, two rounds, and the
fastest of each counts. What the publisher pays once stands beside it, with bytes: a version without the compiled form,
the compiled form (all that such a mirror downloads), and the mirror's folder.

    python benchmarks/mirror.py              # a million users, four minutes; prints and writes benchmarks/mirror.json
    python benchmarks/mirror.py 50000        # prints, writes nothing
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from reader import NOW_US, blocks

from conrec.serving.mirror import mirror, read_index, read_state
from conrec.store import pointers
from conrec.store.compiled import with_compiled
from conrec.store.publish import write_version

USERS, ROUNDS = 1_000_000, 2


def main(users: int) -> None:
    """Writes one version twice, with and without the compiled form, and mirrors both in turns."""
    logging.disable(logging.WARNING)
    figures: dict[str, Any] = {"users": users, "rounds": ROUNDS}
    with tempfile.TemporaryDirectory(prefix="conrec-mirror-") as folder:
        with_it, without = f"{folder}/with", f"{folder}/without"
        about = {"watermark_us": NOW_US, "generated_users": users, "failed_users": 0}
        figures["write_seconds"], manifest = timed(lambda: write_version(without, "v1", blocks(users), about))
        shutil.copytree(without, with_it, copy_function=shutil.copyfile)
        point(without, manifest)
        figures["publisher_compiles_seconds"], manifest = timed(lambda: with_compiled(with_it, manifest, lambda: None))
        point(with_it, manifest)
        figures["version_mb"] = round(sum(entry["bytes"] for entry in manifest["files"]) / 1e6)
        figures["compiled_mb"] = round(manifest["compiled"]["bytes"] / 1e6)
        seconds: dict[str, list[float]] = {"downloaded": [], "compiled here": []}
        held = []
        local = Path(folder) / "mirror"
        for _ in range(ROUNDS):
            for name, store in (("downloaded", with_it), ("compiled here", without)):
                seconds[name].append(timed(partial(mirror, store, str(local)))[0])
                held.append(read_index(local, read_state(local))["shapes"])
                figures["mirror_mb"] = round(sum(path.stat().st_size for path in local.rglob("*.*")) / 1e6)
                shutil.rmtree(local)
        assert all(shapes == held[0] for shapes in held)
    figures["mirror_seconds"] = {name: {"fastest": min(found), "rounds": found} for name, found in seconds.items()}
    figures["times_faster"] = round(min(seconds["compiled here"]) / min(seconds["downloaded"]), 1)
    print(json.dumps(figures, indent=2))
    if users == USERS:
        Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


def point(store: str, manifest: dict[str, Any]) -> None:
    """Publishes the version."""
    pointers.swap_pointer(pointers.observe(store), "v1", pointers.create_manifest(store, "v1", manifest))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    began = time.perf_counter()
    result = work()
    return round(time.perf_counter() - began, 2), result


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else USERS)
