import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrec.catalogue.codebook import Codebook, format_semantic_ids, parse_semantic_ids
from conrec.errors import ArtefactError, DataError

# Tens along the first axis, ones along the second: the code of a point can be read off its coordinates.
TENS_AND_ONES = Codebook(
    codewords=np.array([[[0, 0], [10, 0], [20, 0]], [[0, 0], [0, 1], [0, 2]]], np.float32),
    center=np.array([10, 1], np.float32),
)


def random_codebook(seed: int, layers: int) -> Codebook:
    generator = np.random.default_rng(seed)
    widths = [6, 8, 4][: layers + 1]
    encoder = tuple(
        (generator.normal(size=(o, i)).astype(np.float32), generator.normal(size=o).astype(np.float32))
        for i, o in zip(widths[:-1], widths[1:], strict=True)
    )
    return Codebook(
        generator.normal(size=(3, 5, widths[-1])).astype(np.float32), np.zeros(widths[-1], np.float32), encoder
    )


def test_each_level_takes_the_code_nearest_to_what_is_left() -> None:
    points = np.array([[0.1, 0.2], [19.0, 1.9], [10.4, -3.0], [11.0, 0.9]])
    assert TENS_AND_ONES.encode(points).tolist() == [[0, 0], [2, 2], [1, 0], [1, 1]]
    assert TENS_AND_ONES.reconstruct(np.array([[2, 2], [1, 0]])).tolist() == [[20, 2], [10, 0]]


def test_similarity_subtracts_the_mean() -> None:
    ids = np.array([[2, 2], [0, 0], [2, 0]])
    # Around the mean (10, 1): (10, 1), (-10, -1), (10, -1); without the mean, the first and third have cosine 0.995.
    vectors = TENS_AND_ONES.similarity_vectors(ids)
    assert np.allclose(vectors @ vectors.T, [[1, -1, 99 / 101], [-1, 1, -99 / 101], [99 / 101, -99 / 101, 1]])


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_equal_ids_have_similarity_one(seed: int) -> None:
    codebook = random_codebook(seed, layers=1)
    ids = np.random.default_rng(seed).integers(0, 5, (20, 3))
    vectors = codebook.similarity_vectors(ids)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose((vectors * codebook.similarity_vectors(ids.copy())).sum(axis=1), 1, rtol=1e-6)


def test_an_id_on_the_mean_is_similar_to_itself() -> None:
    vector = TENS_AND_ONES.similarity_vectors(np.array([1, 1]))
    assert vector @ vector == 1


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2))
def test_an_item_has_one_id_alone_and_in_any_batch(seed: int, layers: int) -> None:
    codebook = random_codebook(seed, layers)
    embeddings = np.random.default_rng(seed).normal(size=(40, codebook.input_dim)).astype(np.float32)
    ids = codebook.encode(embeddings)
    assert (np.concatenate([codebook.encode(row[None]) for row in embeddings]) == ids).all()
    assert (codebook.encode(embeddings[::-1]) == ids[::-1]).all()


def test_of_equal_codewords_the_first_is_taken() -> None:
    generator = np.random.default_rng(0)
    word = generator.normal(size=(1, 1, 33)).astype(np.float32)
    codebook = Codebook(np.repeat(word, 61, axis=1), np.zeros(33, np.float32))
    assert not codebook.encode(generator.normal(size=(100, 33))).any()


def test_large_inputs_are_encoded_in_blocks_without_seams() -> None:
    points = np.random.default_rng(0).uniform(0, 20, (10_000, 2))
    given_points = points.copy()
    ids = TENS_AND_ONES.encode(points)
    assert (points == given_points).all()
    assert (ids[:, 0] == np.digitize(points[:, 0], [5, 15])).all()


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("place", ["memory://catalogue/{}/codebook.safetensors", "{}/codebook.safetensors"])
def test_a_loaded_codebook_encodes_new_items_alike(place: str, layers: int, tmp_path: object) -> None:
    url = place.format(tmp_path)
    codebook = random_codebook(3, layers)
    codebook.save(url)
    loaded = Codebook.load(url)
    new_items = np.random.default_rng(9).normal(size=(500, codebook.input_dim))
    assert (loaded.encode(new_items) == codebook.encode(new_items)).all()
    assert len(loaded.encoder) == layers
    assert (loaded.center == codebook.center).all()


def test_a_file_that_is_no_codebook_is_refused(tmp_path: object) -> None:
    path = f"{tmp_path}/codebook.safetensors"
    for content in (b"not safetensors", b"\x02\x00\x00\x00\x00\x00\x00\x00{}"):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(ArtefactError, match="run the catalogue stage again"):
            Codebook.load(path)


def test_embeddings_of_another_width_or_not_finite_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(2, 3\).*\(items, 2\)"):
        TENS_AND_ONES.encode(np.zeros((2, 3)))
    with pytest.raises(DataError, match="item row 1 is not finite"):
        TENS_AND_ONES.encode(np.array([[0, 0], [np.nan, 0]]))


def test_the_written_form() -> None:
    assert format_semantic_ids(np.array([[12, 7, 200]])).to_pylist() == ["<a_12><b_7><c_200>"]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000))
def test_written_ids_are_read_back(levels: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, 65_536, (5, levels)).astype(np.int32)
    assert (parse_semantic_ids(format_semantic_ids(ids), levels) == ids).all()


@pytest.mark.parametrize("text", ["<a_1>", "<a_1><b_2><c_3>", "<b_1><a_2>", "<a_1><b_2> ", "<a_-1><b_2>", "", None])
def test_a_text_that_is_no_id_is_refused(text: str | None) -> None:
    with pytest.raises(DataError, match=r"row 1: .* is not a semantic ID of 2 levels"):
        parse_semantic_ids(pa.array(["<a_1><b_2>", text]), 2)
