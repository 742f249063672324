"""Is the catalogue's language any good: what `quality.json` says of a codebook and its semantic IDs.

    figures = catalogue_quality(embeddings, semantic_ids, codebook, settings, seed, 0.8, categories=table["category"])

Invariant: the figures depend only on the arguments; `warnings` names every level that uses less than 80 % of its codes,
and an index of similar IDs that misses more than 1 %.

What the less obvious ones mean; `reconstruction_cosine`, `neighbour_overlap` and `changed_under_noise` look at
`measured_items` of the items, all where there are no more than `MEASURED_ITEMS`:
- `reconstruction_cosine`: mean over items of the cosine between what was quantised (RQ-VAE: the latent) and the sum of
  its codewords.
- `neighbour_overlap`: mean share of an item's ten nearest items by cosine of the embeddings that are also among its ten
  nearest by similarity of the IDs. Items of one ID tie there; each tied item counts by its chance of being drawn.
- `similar_ids_recall`: of the pairs of IDs at least `similar_ids_at_least` similar (`generate.min_similarity` when the
  catalogue was made), the share that the index of the night finds: 1 up to `FLAT_IDS` distinct IDs, measured beyond
  (conrec/catalogue/neighbours.py).
- `purity`: for each prefix length, the share of items that belong to the most frequent category among the items that
  share their prefix. A prefix of one item is pure, so read it beside the number of prefixes.
- `changed_under_seed`: codes of two fits have no common names, so an ID cannot be compared with an ID. What can is
  whom an item shares a prefix with: per prefix length, the mean over items of 1 - |A n B| / |A u B| (Jaccard), where
  A and B are the items sharing its prefix in the fit and in a refit with another seed. The item itself is left
  out; where it is alone both times, nothing changed.
- `changed_under_noise`: share of items whose first l codes differ when Gaussian noise of 1 % of the mean embedding
  norm is added before encoding with the same codebook.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conrec.catalogue.codebook import Codebook
from conrec.catalogue.neighbours import FLAT_IDS, LEAST_RECALL, NearIndex, recall
from conrec.catalogue.quantizer import fit_codebook
from conrec.config import QuantizerSettings

LEAST_USED_SHARE = 0.8
MEASURED_ITEMS = 100_000
"""Items at most whose reconstruction, neighbours (among each other) and noise are measured."""
NEIGHBOURS = 10
NEIGHBOUR_SAMPLE = 2000
NOISE = 0.01


def catalogue_quality(
    embeddings: np.ndarray,
    semantic_ids: np.ndarray,
    codebook: Codebook,
    settings: QuantizerSettings,
    seed: int,
    min_similarity: float,
    categories: pa.Array | pa.ChunkedArray | None = None,
) -> dict[str, Any]:
    """All figures, ready for JSON; fits a second codebook with seed + 1.

    Shape: embeddings (I, D), semantic_ids (I, L) as `codebook` encodes them, categories (I,) string or None; items
    whose category is null are left out of `purity`, which is None without categories.
    """
    used = [len(np.unique(column)) for column in semantic_ids.T]
    leaves = prefixes(semantic_ids)[-1]
    sizes = np.bincount(leaves)
    refitted = fit_codebook(embeddings, settings, seed + 1).encode(embeddings)
    rows = measured_items(len(embeddings), seed)
    some, some_ids = embeddings[rows], semantic_ids[rows]
    similar = similar_ids(codebook, semantic_ids, min_similarity)
    return {
        "items": len(semantic_ids),
        "measured_items": len(rows),
        "levels": codebook.levels,
        "codes": codebook.codes,
        "codes_used": used,
        "perplexity": [perplexity(column) for column in semantic_ids.T],
        "distinct_semantic_ids": len(sizes),
        "collision_rate": float((sizes[leaves] > 1).mean()),
        "most_items_of_one_semantic_id": int(sizes.max()),
        "reconstruction_cosine": reconstruction_cosine(codebook, some, some_ids),
        "neighbour_overlap": neighbour_overlap(codebook, some, some_ids, seed),
        **similar,
        "purity": None if categories is None else purity(semantic_ids, categories),
        "changed_under_seed": changed_company(semantic_ids, refitted),
        "changed_under_noise": changed_under_noise(codebook, some, some_ids, seed),
        "warnings": [*_unused_codes(used, codebook.codes), *_missed_ids(similar)],
    }


def _unused_codes(used: list[int], codes: int) -> list[str]:
    return [
        f"level {level} uses {count} of {codes} codes ({count / codes:.0%}, below {LEAST_USED_SHARE:.0%}): lower "
        "quantizer.codes, or give items richer embeddings"
        for level, count in enumerate(used)
        if count < LEAST_USED_SHARE * codes
    ]


def _missed_ids(similar: dict[str, Any]) -> list[str]:
    found, similarity = similar["similar_ids_recall"], similar["similar_ids_at_least"]
    if found >= LEAST_RECALL:
        return []
    return [
        f"the index of similar IDs ({similar['similar_ids_index']}) finds {found:.1%} of the pairs at least "
        f"{similarity} similar, below {LEAST_RECALL:.0%}: raise generate.min_similarity, or lower quantizer.codes so "
        f"that there are fewer than {FLAT_IDS:,} IDs"
    ]


def similar_ids(codebook: Codebook, semantic_ids: np.ndarray, min_similarity: float) -> dict[str, Any]:
    """The index of the distinct IDs that a night searches, and its recall. Shape: semantic_ids (I, L)."""
    vectors = np.ascontiguousarray(codebook.similarity_vectors(np.unique(semantic_ids, axis=0)), np.float32)
    index = NearIndex(vectors)
    return {
        "similar_ids_index": index.name,
        "similar_ids_recall": recall(index, vectors, min_similarity),
        "similar_ids_at_least": min_similarity,
    }


def measured_items(items: int, seed: int) -> np.ndarray:
    """Rows of the items that are measured: all, or `MEASURED_ITEMS` drawn from more. Shape: (R,) ascending."""
    if items <= MEASURED_ITEMS:
        return np.arange(items)
    return np.sort(np.random.default_rng(seed).choice(items, MEASURED_ITEMS, replace=False))


def prefixes(semantic_ids: np.ndarray) -> list[np.ndarray]:
    """The prefix of each length that an item has, numbered from 0. Shape: (I, L) -> L arrays (I,)."""
    lengths = range(1, semantic_ids.shape[1] + 1)
    return [np.unique(semantic_ids[:, :length], axis=0, return_inverse=True)[1].reshape(-1) for length in lengths]


def perplexity(codes: np.ndarray) -> float:
    """exp of the entropy of the codes of one level, in [1, codes used]. Shape: codes (I,)."""
    counts = np.bincount(codes)
    shares = counts[counts > 0] / len(codes)
    return float(np.exp(-(shares * np.log(shares)).sum()))


def reconstruction_cosine(codebook: Codebook, embeddings: np.ndarray, semantic_ids: np.ndarray) -> float:
    """Mean cosine between the quantised vectors and their reconstructions; vectors of zeros are left out."""
    cosines = reconstruction_cosines(codebook, embeddings, semantic_ids)
    known = np.isfinite(cosines)
    return float(cosines[known].mean()) if known.any() else 1.0


def reconstruction_cosines(codebook: Codebook, embeddings: np.ndarray, semantic_ids: np.ndarray) -> np.ndarray:
    """Of each item, NaN for a vector of zeros. Shape: (I, D), (I, L) -> (I,) float64."""
    latent, reconstruction = codebook.latent(embeddings), codebook.reconstruct(semantic_ids)
    norms = np.linalg.norm(latent, axis=1) * np.linalg.norm(reconstruction, axis=1)
    dots = (latent * reconstruction).sum(axis=1)
    return np.asarray(np.divide(dots, norms, out=np.full(len(dots), np.nan), where=norms > 0))


def neighbour_overlap(codebook: Codebook, embeddings: np.ndarray, semantic_ids: np.ndarray, seed: int) -> float:
    """Expected overlap of the ten nearest neighbours before and after, over a sample of items."""
    count = min(NEIGHBOURS, len(embeddings) - 1)
    if count < 1:
        return 1.0
    rows = np.random.default_rng(seed).permutation(len(embeddings))[:NEIGHBOUR_SAMPLE]
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    before = np.divide(embeddings, norms, out=np.zeros(embeddings.shape, np.float32), where=norms > 0)
    after = codebook.similarity_vectors(semantic_ids)
    overlaps = [
        (_chances(before, block, count) * _chances(after, block, count)).sum(axis=1) / count
        for block in np.array_split(rows, max(1, len(rows) * len(embeddings) // 2_000_000))
    ]
    return float(np.concatenate(overlaps).mean())


def _chances(vectors: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """Probability that each item is among the `count` nearest of `rows` when ties are broken by lot.

    Shape: vectors (I, D), rows (R,); returns (R, I), each row of sum `count`.
    """
    similarity = vectors[rows] @ vectors.T
    similarity[np.arange(len(rows)), rows] = -np.inf
    border = np.partition(similarity, -count, axis=1)[:, [-count]]
    # Products of equal vectors differ in the last bits.
    nearer, tied = similarity > border + 1e-5, np.abs(similarity - border) <= 1e-5
    left = count - nearer.sum(axis=1, keepdims=True)
    return np.asarray(nearer + tied * (left / tied.sum(axis=1, keepdims=True)))


def purity(semantic_ids: np.ndarray, categories: pa.Array | pa.ChunkedArray) -> list[float] | None:
    """Share of items in the most frequent category of their prefix, per prefix length; None if all are null."""
    known = np.asarray(pc.is_valid(categories))
    if not known.any():
        return None
    names = np.unique(np.asarray(pc.drop_null(categories)).astype(str), return_inverse=True)[1]
    shares = []
    for prefix in prefixes(semantic_ids[known]):
        pairs, counts = np.unique(np.stack([prefix, names]), axis=1, return_counts=True)
        largest = np.zeros(prefix.max() + 1, np.int64)
        np.maximum.at(largest, pairs[0], counts)
        shares.append(float(largest.sum() / known.sum()))
    return shares


def changed_company(semantic_ids: np.ndarray, refitted: np.ndarray) -> list[float]:
    """Mean Jaccard distance between whom an item shares a prefix with in two fits, per prefix length.

    Shape: semantic_ids and refitted (I, L).
    """
    distances = []
    for before, after in zip(prefixes(semantic_ids), prefixes(refitted), strict=True):
        both = np.unique(np.stack([before, after]), axis=1, return_inverse=True)[1].reshape(-1)
        shared = np.bincount(both)[both] - 1
        union = np.bincount(before)[before] + np.bincount(after)[after] - 2 - shared
        distances.append(float(np.where(union > 0, 1 - shared / np.maximum(union, 1), 0).mean()))
    return distances


def changed_under_noise(codebook: Codebook, embeddings: np.ndarray, semantic_ids: np.ndarray, seed: int) -> list[float]:
    """Share of items whose first l codes change under small noise, for l = 1, ..., L."""
    noise = np.random.default_rng(seed).standard_normal(embeddings.shape).astype(np.float32)
    scale = NOISE * np.linalg.norm(embeddings, axis=1).mean() / np.sqrt(embeddings.shape[1])
    changed = codebook.encode(embeddings + scale * noise) != semantic_ids
    return [float(share) for share in np.logical_or.accumulate(changed, axis=1).mean(axis=0)]
