"""A rule blocks the items of exactly its semantic ID, which on the catalogue are what rows of the same IDs block."""

from __future__ import annotations

import numpy as np
import pytest
from nights import DAY, NOW, at

from conrec import storage
from conrec.catalogue.codebook import format_semantic_ids
from conrec.errors import ArtefactError, DataError
from conrec.serving.mirror import mirror
from conrec.serving.reader import BlocklistReader
from conrec.serving.rules_reader import RulesReader


@pytest.fixture
def published(world, tmp_path, codebook_url, publish_unaudited):
    """Rules of random users, and the rows of every item whose ID has one; rules fade at different times."""
    rng = np.random.default_rng(1)
    written = format_semantic_ids(world.trie.semantic_ids).to_pylist()
    rows, rules = [], []
    for number in range(60):
        user, threshold = f"user{number}", float(np.float32(rng.choice([0.2, 0.5, 0.9])))
        for leaf in rng.permutation(9)[: rng.integers(1, 4)]:
            fades = {"demotes_at": NOW + (7 + int(rng.integers(2))) * DAY, "expires_at": NOW + 14 * DAY}
            said = {"user_id": user, "semantic_id": written[leaf], "score": 0.95, **fades}
            rules.append({**said, "threshold": threshold})
            rows += [
                {**said, "item_id": f"item{item:02d}", "reason": "predicted", "similarity": 0.0}
                for item in np.flatnonzero(world.trie.item_leaves == leaf)
            ]
    about = {"codebook": storage.sha256(codebook_url), "catalogue": "the first"}
    return publish_unaudited(str(tmp_path / "store"), rows, rules, about=about)


@pytest.mark.parametrize("place", ["store", "mirror"])
@pytest.mark.parametrize("days", [1, 9, 14])
def test_rules_and_rows_agree_on_the_catalogue(world, published, codebook_url, tmp_path, place, days):
    mirror(published, str(tmp_path / "mirror"))
    root = str(tmp_path / place)
    rules = RulesReader(root, codebook_url, clock=lambda: at(days))
    rows = BlocklistReader(root, clock=lambda: at(days))
    items = world.item_ids.to_pylist()
    codes = world.trie.semantic_ids[world.trie.item_leaves]
    blocked = 0
    for number in range(60):
        user = f"user{number}"
        shown = rows.filter(user, items)
        assert [
            item for item, out in zip(items, rules.match(user, semantic_ids=codes), strict=True) if not out
        ] == shown
        factors = rows.multipliers(user, items)
        np.testing.assert_array_equal(rules.multipliers(user, semantic_ids=codes), factors)
        blocked += len(items) - len(shown)
        assert set(factors) <= {0.0, 1.0, 2 / 7, 1 / 6}
    assert (blocked > 100) == (days == 1)


def test_only_the_very_id_is_blocked_however_near_another_lies(world, tmp_path, codebook_url, publish_unaudited):
    times = {"demotes_at": NOW + 7 * DAY, "expires_at": NOW + 14 * DAY}
    written = format_semantic_ids(np.array([[1, 1], [2, 0]])).to_pylist()
    rules = [{"user_id": "a", "semantic_id": name, "score": 0.5, "threshold": 0.4, **times} for name in written]
    about = {"codebook": storage.sha256(codebook_url), "catalogue": "the first"}
    root = publish_unaudited(str(tmp_path / "store"), [], rules, about=about)
    reader = RulesReader(root, codebook_url, clock=lambda: at(1))
    codes = np.array([[a, b] for a in range(3) for b in range(3)])
    expected = [(a, b) in {(1, 1), (2, 0)} for a, b in codes.tolist()]
    near, other = world.codebook.similarity_vectors(np.array([[1, 1], [1, 2]]))
    assert near @ other > 0.8
    assert reader.match("a", semantic_ids=codes).tolist() == expected
    assert reader.match("a", embeddings=world.codebook.reconstruct(codes)).tolist() == expected
    assert reader.multipliers("a", semantic_ids=codes).tolist() == [0.0 if out else 1.0 for out in expected]


def test_a_new_item_is_blocked_as_its_id_is(world, published, codebook_url):
    """Embeddings near the reconstruction of an ID get this ID, in the catalogue or not."""
    reader = RulesReader(published, codebook_url, clock=lambda: at(1))
    codes = np.array([[a, b] for a in range(3) for b in range(3)])
    embeddings = world.codebook.reconstruct(codes) + np.float32(1e-4)
    assert world.codebook.encode(embeddings).tolist() == codes.tolist()
    for number in range(20):
        by_codes = reader.match(f"user{number}", semantic_ids=codes)
        assert reader.match(f"user{number}", embeddings=embeddings).tolist() == by_codes.tolist()
        single = [reader.match(f"user{number}", embeddings=embedding[None])[0] for embedding in embeddings]
        assert single == by_codes.tolist()


def test_unknown_users_and_no_items_are_blocked_nothing(published, codebook_url):
    reader = RulesReader(published, codebook_url, clock=lambda: at(1))
    assert reader.match("nobody", semantic_ids=np.zeros((3, 2), int)).tolist() == [False] * 3
    assert reader.multipliers("nobody", semantic_ids=np.zeros((3, 2), int)).tolist() == [1] * 3
    assert reader.match("user1", semantic_ids=np.zeros((0, 2), int)).shape == (0,)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({}, "either by semantic_ids or by embeddings"),
        ({"semantic_ids": np.zeros((1, 2), int), "embeddings": np.zeros((1, 6))}, "either by"),
        ({"semantic_ids": np.zeros((1, 3), int)}, r"give \(items, 2\) integers"),
        ({"semantic_ids": np.zeros((1, 2))}, "integers"),
        ({"semantic_ids": np.array([[0, 3]])}, r"codes \[0, 3\)"),
        ({"semantic_ids": np.array([[-1, 0]])}, r"lie in \[-1, 0\]"),
        ({"embeddings": np.zeros((1, 5))}, "fitted on"),
        ({"embeddings": np.full((1, 6), np.nan)}, "not finite"),
    ],
)
def test_items_that_do_not_fit_are_refused(published, codebook_url, items, message):
    reader = RulesReader(published, codebook_url, clock=lambda: at(1))
    with pytest.raises(DataError, match=message):
        reader.match("user1", **items)


def test_rules_of_another_catalogue_are_not_read_with_this_codebook(
    world, published, codebook_url, tmp_path, publish_unaudited
):
    reader = RulesReader(published, codebook_url, clock=lambda: at(1))
    before = reader.match("user1", semantic_ids=world.trie.semantic_ids).tolist()
    publish_unaudited(published, [], [], version="v2", about={"codebook": "0" * 64, "catalogue": "the second"})
    with pytest.raises(ArtefactError, match="the codebook of its catalogue, the second"):
        reader.refresh()
    assert reader.version == "v1"
    assert reader.match("user1", semantic_ids=world.trie.semantic_ids).tolist() == before
    with pytest.raises(ArtefactError, match="was made with the codebook"):
        RulesReader(published, codebook_url)
    named = RulesReader(published, codebook_url, clock=lambda: at(1), version="v1")
    assert named.match("user1", semantic_ids=world.trie.semantic_ids).tolist() == before
    assert not named.refresh()
