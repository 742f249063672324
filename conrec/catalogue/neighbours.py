"""Which semantic IDs lie near a semantic ID: a FAISS index of the vectors of all IDs, and what it finds of them.

    index = NearIndex(vectors)
    rows, leaves = index.pairs(vectors[queries], 0.8)
    recall(index, vectors, 0.8)                  # 1.0 up to FLAT_IDS

Up to `FLAT_IDS` every vector is looked at. Beyond, k-means puts the vectors into cells and a query looks into the
`PROBES` whose centres are nearest to it (FAISS's IndexIVFFlat): what lies in another cell is missed, and `recall` says
how much that is. On a machine with a GPU both are searched there.

Invariant: the index is a function of the vectors alone: the catalogue that measures the recall and the night that
searches have the same one. No pair is found that a flat index does not find.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from conrec.errors import MissingDependencyError

FLAT_IDS = 1 << 17
"""So many are all compared: minutes on one core for the neighbours of every one of them (benchmarks/neighbours.py)."""
PROBES = 32
"""Cells that a query looks into: twice what finds every pair of 100,000 IDs there; 99.98 % of a million's."""
GPU_NEIGHBOURS = 2048
"""The most neighbours a FAISS GPU index returns; it has no range search."""
MEASURED_IDS = 500
LEAST_RECALL = 0.99
"""Below this the catalogue warns."""
_SEED = 0
_ROUNDS = 10
_POINTS_PER_CELL = 40
_VECTORS_AT_ONCE = 1 << 16


class NearIndex:
    """Finds the vectors whose dot product with a query is above a radius."""

    def __init__(self, vectors: np.ndarray) -> None:
        """Shape: vectors (M, D) float32 of length 1. Raises `MissingDependencyError` without FAISS."""
        self.cells = 0 if len(vectors) <= FLAT_IDS else round(4 * len(vectors) ** 0.5)
        self._exact = _built(vectors, self.cells)
        self._on_gpu = _on_gpu(self._exact)

    @property
    def name(self) -> str:
        """In words, for a report."""
        return f"{min(PROBES, self.cells)} of {self.cells} cells" if self.cells else "flat"

    def pairs(self, queries: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Every (query, vector) above the radius that the index finds, each once, sorted by neither.

        Shape: queries (Q, D) float32; returns two (N,) int64. FAISS sums float32 in an order of its own.
        """
        if self._on_gpu is None:
            return within(self._exact, queries, radius)
        return nearest(self._on_gpu, self._exact, queries, radius, GPU_NEIGHBOURS)


def recall(index: NearIndex, vectors: np.ndarray, similarity: float) -> float:
    """The share that the index finds of the pairs at least so similar, over `MEASURED_IDS` vectors drawn at random.

    Pairs of a vector with itself do not count: every index finds them. 1.0 where there are no others.
    Shape: vectors (M, D), those of the index.
    """
    if not index.cells:
        return 1.0
    drawn = np.random.default_rng(_SEED).permutation(len(vectors))[:MEASURED_IDS]
    found = _keys(drawn, *index.pairs(vectors[drawn], similarity), len(vectors))
    parts = []
    for start in range(0, len(vectors), _VECTORS_AT_ONCE):
        rows, columns = np.nonzero(vectors[drawn] @ vectors[start : start + _VECTORS_AT_ONCE].T > similarity)
        parts.append(_keys(drawn, rows, columns + start, len(vectors)))
    there = np.concatenate(parts)
    return float(np.isin(there, found).mean()) if len(there) else 1.0


def _keys(drawn: np.ndarray, rows: np.ndarray, leaves: np.ndarray, count: int) -> np.ndarray:
    """One number a pair, without those of a vector and itself."""
    others = drawn[rows] != leaves
    return np.asarray(rows[others] * count + leaves[others])


def _built(vectors: np.ndarray, cells: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingDependencyError.of("faiss") from None
    flat = faiss.IndexFlatIP(vectors.shape[1])
    index: Any = flat
    if cells:
        index = faiss.IndexIVFFlat(flat, vectors.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = min(PROBES, cells)
        index.cp.seed, index.cp.niter, index.cp.spherical = _SEED, _ROUNDS, True
        index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, _POINTS_PER_CELL
        index.train(vectors)
    index.add(vectors)
    return index


def _on_gpu(index: Any) -> Any | None:
    """A copy of the index on all GPUs; None without one."""
    import faiss

    # Wheels built for GPUs run without one, and only they have this function.
    if not hasattr(faiss, "index_cpu_to_all_gpus") or faiss.get_num_gpus() == 0:
        return None
    return faiss.index_cpu_to_all_gpus(index)


def within(index: Any, queries: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """(query, leaf) pairs above the radius, by range search on the CPU."""
    limits, _, neighbours = index.range_search(queries, radius)
    return np.repeat(np.arange(len(queries)), np.diff(limits.astype(np.int64))), neighbours.astype(np.int64)


def nearest(
    index: Any, exact: Any, queries: np.ndarray, radius: float, neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same pairs from an index that only has nearest neighbours.

    A query whose last neighbour still lies above the radius may have more; it is searched again on the CPU index
    `exact`, because a truncated answer would silently leave items out.
    """
    k = min(neighbours, index.ntotal)
    dots, found = index.search(queries, k)
    above = (dots > radius) & (found >= 0)
    truncated = above[:, -1] & (k < index.ntotal)
    above[truncated] = False
    rows, columns = np.nonzero(above)
    leaves = found[rows, columns].astype(np.int64)
    again = np.flatnonzero(truncated)
    if len(again) == 0:
        return rows, leaves
    more, more_leaves = within(exact, queries[again], radius)
    return np.concatenate([rows, again[more]]), np.concatenate([leaves, more_leaves])
