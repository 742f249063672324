import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.catalogue.trie import Trie
from conrec.errors import DataError

CODES = 5


def id_tables(max_items: int = 30) -> st.SearchStrategy[np.ndarray]:
    """Unsorted (I, L) IDs over few codes, so that repeats and shared prefixes are frequent."""
    return st.integers(1, 4).flatmap(
        lambda levels: st.lists(
            st.lists(st.integers(0, CODES - 1), min_size=levels, max_size=levels), min_size=1, max_size=max_items
        ).map(np.array)
    )


def walk(trie: Trie, semantic_id: tuple[int, ...]) -> int:
    """The plain walk over the CSR arrays: leaf, or -1."""
    node = 0
    for level, code in enumerate(semantic_id):
        start, end = trie.child_offsets[level][node : node + 2]
        children = trie.child_codes[level][start:end].tolist()
        if code not in children:
            return -1
        node = int(start) + children.index(code)
    return node


def paths(trie: Trie, level: int = 0, node: int = 0) -> list[tuple[int, ...]]:
    """Every root-to-leaf path, depth first."""
    if level == trie.levels:
        return [()]
    start, end = trie.child_offsets[level][node : node + 2]
    return [
        (int(trie.child_codes[level][edge]), *rest)
        for edge in range(start, end)
        for rest in paths(trie, level + 1, edge)
    ]


@settings(deadline=None)
@given(id_tables())
def test_every_item_walks_to_its_leaf_and_every_path_is_an_item(semantic_ids: np.ndarray) -> None:
    trie = Trie.build(semantic_ids, CODES)
    for row, semantic_id in enumerate(map(tuple, semantic_ids.tolist())):
        leaf = walk(trie, semantic_id)
        assert leaf == trie.item_leaves[row]
        assert row in trie.leaf_items[leaf]
        assert tuple(trie.semantic_ids[leaf]) == semantic_id
    assert paths(trie) == sorted(set(map(tuple, semantic_ids.tolist())))


@settings(deadline=None)
@given(id_tables())
def test_children_are_those_of_the_whole_prefix(semantic_ids: np.ndarray) -> None:
    trie = Trie.build(semantic_ids, CODES)
    known = [tuple(row) for row in semantic_ids.tolist()]
    prefixes: list[tuple[int, ...]] = [()]
    for level in range(trie.levels):
        following = []
        for node, prefix in enumerate(prefixes):
            start, end = trie.child_offsets[level][node : node + 2]
            children = trie.child_codes[level][start:end].tolist()
            assert children == sorted({row[level] for row in known if row[:level] == prefix})
            following += [(*prefix, code) for code in children]
        prefixes = following
    assert len(prefixes) == len(trie)


def test_a_code_allowed_elsewhere_is_not_allowed_here() -> None:
    # 0-1-0 and 1-1-1 share the code 1 at the second place; by position or by bigram 0-1-1 would exist.
    trie = Trie.build(np.array([[0, 1, 0], [1, 1, 1]]), codes=2)
    assert trie.find(np.array([[0, 1, 1], [1, 1, 0], [0, 1, 0]])).tolist() == [-1, -1, 0]


@settings(deadline=None)
@given(id_tables(), st.integers(0, 2**32 - 1))
def test_find_equals_a_dictionary(semantic_ids: np.ndarray, seed: int) -> None:
    trie = Trie.build(semantic_ids, CODES)
    leaves = {tuple(row): leaf for leaf, row in enumerate(trie.semantic_ids.tolist())}
    # -1 and CODES are no codes; folded into a key they would name a neighbour's child.
    guesses = np.random.default_rng(seed).integers(-1, CODES + 1, (200, trie.levels))
    queries = np.concatenate([guesses, semantic_ids])
    assert trie.find(queries).tolist() == [leaves.get(tuple(row), -1) for row in queries.tolist()]


@settings(deadline=None)
@given(id_tables())
def test_each_item_lies_in_one_leaf(semantic_ids: np.ndarray) -> None:
    trie = Trie.build(semantic_ids, CODES)
    assert sorted(trie.leaf_items.values.tolist()) == list(range(len(semantic_ids)))
    assert (trie.item_leaves[trie.leaf_items.values] == trie.leaf_items.rows).all()


def test_a_single_item() -> None:
    trie = Trie.build(np.array([[3, 0, 4]]), codes=5)
    assert [codes.tolist() for codes in trie.child_codes] == [[3], [0], [4]]
    assert trie.find(np.array([[3, 0, 4], [3, 0, 3]])).tolist() == [0, -1]
    assert trie.find(np.empty((0, 3), int)).shape == (0,)


@pytest.mark.parametrize("semantic_ids", [np.empty((0, 3), int), np.empty((3, 0), int), np.array([1, 2])])
def test_an_empty_catalogue_is_refused(semantic_ids: np.ndarray) -> None:
    with pytest.raises(DataError, match="encode the items"):
        Trie.build(semantic_ids, codes=4)


@pytest.mark.parametrize("code", [-1, 4])
def test_a_code_out_of_range_is_refused(code: int) -> None:
    with pytest.raises(DataError, match=rf"item row 1, level 0: code {code} is outside \[0, 4\)"):
        Trie.build(np.array([[0, 1], [code, 1]]), codes=4)
