"""Resolution equals brute force, and a similarity does not depend on how its pair was found."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.blocklist import resolve as module
from conrec.blocklist.resolve import (
    leaf_vectors,
    near,
    pair_similarities,
    resolve,
)
from conrec.catalogue.codebook import Codebook
from conrec.catalogue.trie import Trie
from conrec.errors import ArtefactError
from conrec.ragged import Ragged


def random_catalogue(seed, items=400, codes=8, dim=16):
    rng = np.random.default_rng(seed)
    semantic_ids = rng.integers(0, codes, (items, 3))
    codewords = (rng.normal(size=(3, codes, dim)) * np.array([1, 0.5, 0.2])[:, None, None]).astype(np.float32)
    center = codewords[np.arange(3), semantic_ids].sum(axis=1).mean(axis=0)
    codebook = Codebook(codewords, center)
    trie = Trie.build(semantic_ids, codes)
    return trie, leaf_vectors(codebook, trie), rng


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.5, 0.9, 1.0])
def test_resolution_equals_brute_force(theta):
    trie, vectors, rng = random_catalogue(0)
    leaves = np.unique(rng.integers(0, len(trie), 50))
    resolution = resolve(leaves, trie, vectors, theta)
    dots = vectors[leaves].astype(np.float64) @ vectors[trie.item_leaves].T
    for row in range(len(leaves)):
        expected = dict(enumerate(dots[row]))
        part = slice(resolution.items.offsets[row], resolution.items.offsets[row + 1])
        found = dict(zip(resolution.items[row].tolist(), resolution.similarities[part].tolist(), strict=True))
        assert len(found) == len(resolution.items[row])
        assert all(abs(similarity - expected[item]) < 1e-5 for item, similarity in found.items())
        assert {item for item, dot in expected.items() if dot >= theta + 1e-6} <= found.keys()
        assert found.keys() <= {item for item, dot in expected.items() if dot >= theta - 1e-6}
        assert (np.diff(resolution.similarities[part]) <= 0).all()


def test_items_that_share_the_id_are_all_found_and_exactly_alike(world):
    vectors = leaf_vectors(world.codebook, world.trie)
    leaf = world.trie.find(np.array([[1, 1]]))
    resolution = resolve(leaf, world.trie, vectors, 1.0)
    assert sorted(resolution.items[0].tolist()) == [4, 10, 11]
    assert (resolution.similarities == 1).all()


def test_a_theta_above_one_catches_nothing(world):
    resolution = resolve(np.arange(3), world.trie, leaf_vectors(world.codebook, world.trie), float("inf"))
    assert len(resolution.items) == 3
    assert len(resolution.items.values) == 0


def test_similarity_is_the_same_found_for_a_pair_and_by_resolution():
    """A cut lies between two float32 numbers: a difference in the last bit would change what is near."""
    trie, vectors, rng = random_catalogue(2)
    leaves = np.unique(rng.integers(0, len(trie), 30))
    resolution = resolve(leaves, trie, vectors, -1.0)
    items = np.arange(len(trie.item_leaves))
    for row, leaf in enumerate(leaves):
        part = slice(resolution.items.offsets[row], resolution.items.offsets[row + 1])
        resolved = np.empty(len(items), np.float32)
        resolved[resolution.items[row]] = resolution.similarities[part]
        alone = pair_similarities(vectors, np.full(len(items), leaf), trie.item_leaves)
        assert np.array_equal(alone, resolved)


def test_a_cut_at_an_observed_similarity_keeps_it():
    trie, vectors, _ = random_catalogue(4)
    everything = resolve(np.array([5]), trie, vectors, -1.0)
    for similarity in np.unique(everything.similarities)[::7]:
        kept = resolve(np.array([5]), trie, vectors, float(similarity)).similarities
        above = resolve(np.array([5]), trie, vectors, float(np.nextafter(similarity, np.float32(2)))).similarities
        assert len(kept) == (everything.similarities >= similarity).sum()
        assert len(above) == (everything.similarities > similarity).sum()


def plain_near(generated, theta, trie, vectors):
    result = {}
    for user in range(len(generated)):
        for item, item_leaf in enumerate(trie.item_leaves):
            for leaf in generated[user]:
                similarity = pair_similarities(vectors, np.array([leaf]), np.array([item_leaf]))[0]
                if similarity >= theta and ((user, item) not in result or similarity > result[user, item][0]):
                    result[user, item] = (similarity, leaf)
    return result


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_near_takes_the_nearest_id_of_each_user_and_the_most_probable_of_equals(seed, pairs_at_once):
    trie, vectors, rng = random_catalogue(seed % 5, items=25, codes=3, dim=4)
    # Two leaves of one place: everything is equally near both.
    vectors[1] = vectors[0]
    lengths = rng.integers(0, 5, 6)
    leaves = [rng.permutation(len(trie))[:length] for length in lengths]
    generated = Ragged.from_lengths(np.concatenate(leaves), lengths)
    theta = np.float32(rng.choice([0.2, 0.7, 1.0]))
    resolution = resolve(np.unique(generated.values), trie, vectors, float(theta))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIRS_AT_ONCE", pairs_at_once)
        found = near(generated, resolution)
    columns = (found.rows.tolist(), found.items.tolist(), found.similarities, found.leaves)
    by_pair = {(row, item): (similarity, leaf) for row, item, similarity, leaf in zip(*columns, strict=True)}
    expected = plain_near(generated, theta, trie, vectors)
    assert list(by_pair) == sorted(expected)
    assert by_pair == expected


def test_a_leaf_that_was_not_resolved_is_an_error(world):
    vectors = leaf_vectors(world.codebook, world.trie)
    resolution = resolve(np.array([1, 2]), world.trie, vectors, 0.5)
    with pytest.raises(ArtefactError, match="leaf 7"):
        near(Ragged(np.array([1, 7]), np.array([0, 2])), resolution)


@pytest.mark.long
def test_without_faiss_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import numpy as np\n"
        "from conrec.catalogue.neighbours import NearIndex\n"
        "from conrec.errors import MissingDependencyError\n"
        "try:\n    NearIndex(np.eye(2, dtype=np.float32))\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "make .venv/complete" in output
