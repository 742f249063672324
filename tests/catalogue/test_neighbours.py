"""What an index of cells finds is what a flat one finds, but for what its recall says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conrec.blocklist.resolve import leaf_vectors, resolve
from conrec.catalogue import neighbours as module
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.neighbours import NearIndex, nearest, recall, within
from conrec.catalogue.quality import catalogue_quality
from conrec.catalogue.quantizer import fit_codebook
from conrec.catalogue.trie import Trie
from conrec.config import QuantizerSettings


def unit_vectors(count=1000, dim=16, groups=15):
    """Groups of vectors, some of which lie between two groups."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(groups, dim))[rng.integers(groups, size=count)] + 0.4 * rng.normal(size=(count, dim))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def pairs(index, vectors, radius):
    return set(zip(*(array.tolist() for array in index.pairs(vectors, radius)), strict=True))


@pytest.fixture
def in_cells(monkeypatch):
    """Every index has cells, of which a query looks into so many."""

    def probing(probes):
        monkeypatch.setattr(module, "FLAT_IDS", 0)
        monkeypatch.setattr(module, "PROBES", probes)

    return probing


def test_cells_that_are_all_looked_into_find_what_a_flat_index_finds(in_cells):
    vectors = unit_vectors()
    flat = NearIndex(vectors)
    in_cells(10_000)
    every = NearIndex(vectors)
    assert (flat.name, every.name) == ("flat", "126 of 126 cells")
    assert pairs(flat, vectors[:300], 0.7) == pairs(every, vectors[:300], 0.7)
    assert recall(flat, vectors, 0.7) == recall(every, vectors, 0.7) == 1


def test_the_recall_is_the_share_of_pairs_that_are_found(in_cells, monkeypatch):
    vectors = unit_vectors()
    itself = {(row, row) for row in range(len(vectors))}
    exact = pairs(NearIndex(vectors), vectors, 0.5) - itself
    monkeypatch.setattr(module, "MEASURED_IDS", len(vectors))
    monkeypatch.setattr(module, "_VECTORS_AT_ONCE", 300)
    shares = []
    for probes in (1, 4, 32):
        in_cells(probes)
        index = NearIndex(vectors)
        found = pairs(index, vectors, 0.5) - itself
        assert found < exact
        shares.append(recall(index, vectors, 0.5))
        # FAISS and numpy sum in orders of their own, so a pair at the very border may be on either side.
        assert shares[-1] == pytest.approx(len(found) / len(exact), abs=1e-4)
    assert shares == sorted(shares) and shares[0] < 0.7 < 0.95 < shares[-1]
    again = NearIndex(vectors)
    assert pairs(again, vectors, 0.5) == pairs(index, vectors, 0.5)


def test_nothing_near_is_nothing_missed(in_cells):
    in_cells(1)
    vectors = np.eye(20, dtype=np.float32)
    assert recall(NearIndex(vectors), vectors, 0.5) == 1


def test_a_night_resolves_by_cells_what_it_resolves_flat(in_cells):
    rng = np.random.default_rng(1)
    semantic_ids = rng.integers(0, 8, (400, 3))
    trie = Trie.build(semantic_ids, 8)
    vectors = leaf_vectors(Codebook(rng.normal(size=(3, 8, 16)).astype(np.float32), np.zeros(16, np.float32)), trie)
    flat = resolve(np.arange(0, len(trie), 3), trie, vectors, 0.3)
    in_cells(10_000)
    cells = resolve(np.arange(0, len(trie), 3), trie, vectors, 0.3)
    assert len(flat.items.values) > len(trie)
    assert np.array_equal(flat.items.values, cells.items.values)
    assert np.array_equal(flat.items.offsets, cells.items.offsets)
    assert np.array_equal(flat.similarities, cells.similarities)


def test_nearest_neighbours_search_again_where_they_are_truncated(in_cells):
    """A GPU index has no range search; too few neighbours must not silently leave items out."""
    vectors = unit_vectors(500)
    in_cells(3)
    for index in (module._built(vectors, 0), module._built(vectors, 40)):
        expected = set(zip(*(array.tolist() for array in within(index, vectors[:20], 0.3)), strict=True))
        for count in (1, 4, 30, len(vectors), 5000):
            rows, found = nearest(index, index, vectors[:20], 0.3, count)
            got = list(zip(rows.tolist(), found.tolist(), strict=True))
            assert len(got) == len(set(got))
            assert set(got) == expected


def test_the_catalogue_reports_the_recall_of_the_index_of_the_night_and_warns(in_cells):
    spread = np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32)
    settings = QuantizerSettings(levels=3, codes=8, iterations=5)
    codebook = fit_codebook(spread, settings, seed=0)
    semantic_ids = codebook.encode(spread)
    flat = catalogue_quality(spread, semantic_ids, codebook, settings, 0, 0.8)
    assert (flat["similar_ids_index"], flat["similar_ids_recall"], flat["warnings"]) == ("flat", 1, [])
    in_cells(1)
    figures = catalogue_quality(spread, semantic_ids, codebook, settings, 0, 0.8)
    vectors = leaf_vectors(codebook, Trie.build(semantic_ids, 8))
    assert figures["similar_ids_recall"] == recall(NearIndex(vectors), vectors, 0.8) < 0.9
    (warning,) = figures["warnings"]
    assert f"finds {figures['similar_ids_recall']:.1%} of the pairs at least 0.8 similar, below 99%" in warning
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
