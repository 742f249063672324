"""Similar IDs by a flat index and by cells (conrec/catalogue/neighbours.py): time, memory and recall as IDs grow.

The vectors are those of semantic IDs: sums of three codewords of 256, drawn at random, each level 0.6 of the one above,
some codes far more frequent than others; less their mean, of length 1. Both indexes are asked for what is at least 0.8
similar to 500 of them, on one thread. Times are of this process's CPU, since other work may share the machine; memory
is what the index added to the process, less what an index before it gave back: read the first of each kind.

    python benchmarks/neighbours.py            # 5 thousand to 1 million IDs; writes benchmarks/neighbours.json
    python benchmarks/neighbours.py 20000 384  # one size, prints, writes nothing
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from conrec.catalogue import neighbours
from conrec.catalogue.neighbours import NearIndex, recall

SIZES = ((5_000, 384), (100_000, 384), (100_000, 768), (1_000_000, 384))
CODES, LEVELS, SIMILARITY = 256, 3, 0.8
QUERIES = 500
PROBES = (8, 16, 32, 64)


def main() -> None:
    """A process for each size, one after the other."""
    rows = []
    for ids, dim in SIZES:
        command = [sys.executable, __file__, str(ids), str(dim)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(json.dumps(rows[-1]), flush=True)
    figures = {"similarity": SIMILARITY, "queries": QUERIES, "threads": 1, "sizes": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")


def measured(ids: int, dim: int) -> dict[str, Any]:
    """Both indexes over so many IDs."""
    import faiss

    faiss.omp_set_num_threads(1)
    vectors = id_vectors(ids, dim)
    queries = vectors[np.random.default_rng(1).permutation(len(vectors))[:QUERIES]]
    figures: dict[str, Any] = {"ids": len(vectors), "dim": dim}
    neighbours.FLAT_IDS = len(vectors)
    figures["flat"], flat_ms = searched(vectors, queries)
    neighbours.FLAT_IDS, figures["cells"] = 0, {}
    for probes in PROBES if ids <= 100_000 else (neighbours.PROBES,):
        neighbours.PROBES = probes
        found, ms = searched(vectors, queries)
        figures["cells"][str(probes)] = found | {"times_faster": round(flat_ms / ms, 1)}
    return figures


def searched(vectors: np.ndarray, queries: np.ndarray) -> tuple[dict[str, Any], float]:
    """What an index takes, and milliseconds a query."""
    before, began = resident_mib(), time.process_time()
    index = NearIndex(vectors)
    built, after = time.process_time() - began, resident_mib()
    began = time.process_time()
    rows, _ = index.pairs(queries, SIMILARITY)
    ms = 1e3 * (time.process_time() - began) / len(queries)
    return {
        "index": index.name,
        "build_seconds": round(built, 1),
        "mib": after - before,
        "ms_an_id": round(ms, 3),
        "minutes_for_all_ids": round(ms * len(vectors) / 60e3, 1),
        "pairs_an_id": round(len(rows) / len(queries), 1),
        "recall": round(recall(index, vectors, SIMILARITY), 4),
    }, ms


def id_vectors(ids: int, dim: int) -> np.ndarray:
    """Vectors of distinct semantic IDs in their order. Shape: (ids, dim) float32 of length 1."""
    draw = np.random.default_rng(0)
    scale = 0.6 ** np.arange(LEVELS)
    codewords = (draw.normal(size=(LEVELS, CODES, dim)) * scale[:, None, None]).astype(np.float32)
    frequent = draw.dirichlet(np.full(CODES, 0.5), LEVELS)
    keys = np.zeros(0, np.int64)
    while len(keys) < ids:
        codes = [draw.choice(CODES, ids, p=frequent[level]) for level in range(LEVELS)]
        keys = np.unique(np.concatenate([keys, np.ravel_multi_index(codes, (CODES,) * LEVELS)]))
    keys = np.sort(draw.permutation(keys)[:ids])
    vectors = sum(codewords[level][code] for level, code in enumerate(np.unravel_index(keys, (CODES,) * LEVELS)))
    vectors -= vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors, np.float32)


def resident_mib() -> int:
    """Memory of this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) // 1024


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measured(int(sys.argv[1]), int(sys.argv[2]))))
    else:
        main()
