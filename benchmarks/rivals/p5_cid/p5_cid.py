"""P5-CID: collaborative IDs in the place of ours, so that the same trainer and the same evaluation compare them.

    .venv/bin/python benchmarks/rivals/p5_cid/p5_cid.py --config examples/kuairand/quick.toml root=runs/p5-cid
    .venv/bin/conrec train --config examples/kuairand/quick.toml --set root=runs/p5-cid

Hua et al., SIGIR-AP 2023 (arXiv 2305.06569), section 4.4: items that users met together are the edges of a graph, whose
normalised adjacency is clustered into `BRANCHES` by its eigenvectors (Ng, Jordan and Weiss, NIPS 2001), each cluster
again by the graph within it, and an item counted within its last cluster. A code so means something under its prefix
alone, where residual quantisation shares the codes of a level. Left out: IDs of different lengths, which our trie does
not have: clusters are split however small they are.

The catalogue is left below the root as a finished one of these settings, which training then takes. Its codebook is
one-hot: IDs are as alike as they have codes in common. Items that it was not fitted on cannot be encoded with it.
Further arguments are settings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import eigsh

from conrec import storage
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.items import semantic_id_column
from conrec.catalogue.quality import catalogue_quality
from conrec.catalogue.quantizer import k_means
from conrec.config import load_settings
from conrec.feedback.events import Events
from conrec.stages.artefacts import Artefacts
from conrec.stages.inputs import read_events

BRANCHES = 20
"""Clusters of a cluster, as in the publication."""
MOST_ITEMS_PER_USER = 200
"""So many of a user's items, the latest, make edges: as for the behaviour vectors of our own catalogue."""
_DENSE = 400
"""Up to so many items all eigenvectors are computed, which is faster than some of them."""


def main() -> None:
    """Leaves the catalogues of the settings: that of the cut, and that of the validation time."""
    parser = argparse.ArgumentParser(description="catalogues with the IDs of P5-CID")
    parser.add_argument("--config", required=True)
    parser.add_argument("settings", nargs="*", help="section.setting=value, root=... among them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = Artefacts(load_settings(arguments.config, arguments.settings))
    for one in {side.exact("catalogue").version: side for side in (run.earlier, run)}.values():
        print(leave_catalogue(one))


def leave_catalogue(run: Artefacts) -> str:
    """Finishes the catalogue of these settings with collaborative IDs; its folder."""
    config, items, began = run.config, run.sources.items, time.perf_counter()
    artefact = run.exact("catalogue")
    if not config.timeline.refit:
        config = run.earlier.config
    events = read_events(config, items["item_id"].combine_chunks(), config.timeline.cut_us)
    levels, codes = config.quantizer.levels, config.quantizer.codes
    semantic_ids = collaborative_ids(together(events, len(items)), levels, codes, BRANCHES, config.seed)
    codebook = one_hot_codebook(semantic_ids, codes)
    embeddings = codebook.reconstruct(semantic_ids)
    categories = items["category"] if "category" in items.column_names else None
    least = config.generate.min_similarity
    quality = catalogue_quality(embeddings, semantic_ids, codebook, config.quantizer, config.seed, least, categories)
    named = items.append_column("semantic_id", semantic_id_column(semantic_ids))
    storage.write_table(named, artefact.path("items.parquet"))
    codebook.save(artefact.path("codebook.safetensors"))
    storage.write_json(artefact.path("quality.json"), quality)
    figures = quality | {"read_until": config.timeline.cut.isoformat()}
    artefact.finish(figures, time.perf_counter() - began)
    return artefact.url


def together(events: Events, item_count: int) -> sparse.csr_array:
    """Users who met both of two items, among their latest items. Shape: (I, I) float32, symmetric, nothing on the
    diagonal."""
    rows, from_end = events.rows, np.repeat(events.offsets[1:], np.diff(events.offsets)) - np.arange(len(events))
    latest = from_end <= MOST_ITEMS_PER_USER
    met = sparse.csr_array(
        (np.ones(latest.sum(), np.float32), (rows[latest], events.items[latest])),
        shape=(len(events.users), item_count),
    )
    met.sum_duplicates()
    met.data[:] = 1
    pairs = sparse.coo_array(met.T @ met)
    apart = pairs.row != pairs.col
    kept = (pairs.data[apart], (pairs.row[apart], pairs.col[apart]))
    return sparse.csr_array(sparse.coo_array(kept, shape=pairs.shape))


def collaborative_ids(graph: sparse.csr_array, levels: int, codes: int, branches: int, seed: int) -> np.ndarray:
    """The path of clusters to each item, and its place in the last of them.

    Items without an edge are counted through behind the clusters of the first level. Places above `codes` begin again,
    and such items share an ID. Shape: graph (I, I) symmetric -> (I, levels) int32 below `codes`.
    Raises ValueError for more branches than the codes have room for.
    """
    if not 2 <= branches < codes:
        raise ValueError(
            f"branches {branches} do not fit below {codes} codes; give at least 2 and fewer than the codes"
        )
    ids = np.zeros((graph.shape[0], levels), np.int32)
    degree = np.asarray(graph.sum(axis=1)).ravel()
    alone, known = np.flatnonzero(degree == 0), np.flatnonzero(degree > 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups = [(known, 0)]
        for level in range(levels - 1):
            groups = list(_split(graph, groups, ids, level, branches))
    for items, _ in groups:
        ids[items, -1] = np.arange(len(items)) % codes
    place = np.arange(len(alone))
    ids[alone, 0] = branches
    ids[alone, -1] = place % codes
    if levels > 2:
        ids[alone, -2] = place // codes % codes
    return ids


def _split(
    graph: sparse.csr_array, groups: list[tuple[np.ndarray, int]], ids: np.ndarray, level: int, branches: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The clusters of each group of items, after their codes were written to a level of `ids`."""
    for items, _ in groups:
        clusters = spectral_clusters(graph[items][:, items], branches)
        ids[items, level] = clusters
        for cluster in np.unique(clusters):
            yield items[clusters == cluster], int(cluster)


def spectral_clusters(graph: sparse.csr_array, count: int) -> np.ndarray:
    """Cluster of each node, below `count`. Shape: graph (N, N) symmetric -> (N,) int32."""
    if graph.shape[0] <= count:
        return np.arange(graph.shape[0], dtype=np.int32)
    # A node that lost its edges to other clusters is held by itself.
    degree = np.asarray(graph.sum(axis=1)).ravel() + 1e-3
    scale = sparse.diags_array(1 / np.sqrt(degree))
    balanced = scale @ (graph + 1e-3 * sparse.eye_array(graph.shape[0])) @ scale
    if graph.shape[0] <= max(_DENSE, 2 * count):
        vectors = np.linalg.eigh(balanced.toarray())[1][:, -count:]
    else:
        vectors = eigsh(balanced, count, which="LA", v0=np.ones(graph.shape[0]))[1]
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    points = torch.as_tensor(vectors, dtype=torch.float32)
    return torch.cdist(points, k_means(points, count, iterations=25)).argmin(dim=1).numpy().astype(np.int32)


def one_hot_codebook(semantic_ids: np.ndarray, codes: int) -> Codebook:
    """A codebook whose reconstructions name the codes. Shape: semantic_ids (I, L)."""
    levels = semantic_ids.shape[1]
    codewords = np.eye(levels * codes, dtype=np.float32).reshape(levels, codes, levels * codes)
    uncentred = Codebook(codewords, np.zeros(levels * codes, np.float32))
    center = uncentred.reconstruct(semantic_ids).mean(axis=0, dtype=np.float64)
    return Codebook(codewords, center.astype(np.float32))


if __name__ == "__main__":
    main()
