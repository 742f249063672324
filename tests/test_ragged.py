"""Rows of different lengths, against loops over lists."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from conrec import storage
from conrec.ragged import Ragged, blocks, distinct, pairs, places


def test_padding_with_minus_infinity() -> None:
    rows = Ragged.from_lengths(np.array([-1.5, -2.0, -0.25], np.float32), np.array([2, 0, 1]))
    dense = rows.padded(-np.inf)
    empty = -np.inf
    assert dense.dtype == np.float32
    assert dense.tolist() == [[-1.5, -2.0], [empty, empty], [-0.25, empty]]


def test_padding_keeps_the_type_of_the_values() -> None:
    rows = Ragged.from_lengths(np.array([7, 8], np.int32), np.array([0, 2]))
    assert rows.padded(-1).dtype == np.int32
    assert rows.padded(-1).tolist() == [[-1, -1], [7, 8]]
    assert Ragged.from_lengths(np.zeros(0, np.float32), np.zeros(3, np.int64)).padded(-np.inf).shape == (3, 0)


LENGTHS = st.lists(st.integers(0, 4), max_size=8).map(lambda lengths: np.array(lengths, np.int64))


@run_settings(max_examples=40, deadline=None)
@given(LENGTHS)
def test_places_are_those_of_a_loop(lengths: np.ndarray) -> None:
    assert places(lengths).tolist() == [place for length in lengths for place in range(length)]


@run_settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 9)), max_size=20))
def test_pairs_give_both_back_and_order_as_the_pairs_do(drawn: list[tuple[int, int]]) -> None:
    rows, values = (np.array([pair[part] for pair in drawn], np.int32) for part in (0, 1))
    keys = pairs(rows, values, 10)
    assert keys.dtype == np.int64
    assert [(row, value) for row, value in zip(*np.divmod(keys, 10), strict=True)] == drawn
    assert np.argsort(keys, kind="stable").tolist() == sorted(range(len(drawn)), key=drawn.__getitem__)


@pytest.mark.parametrize("most", [3, 4])
def test_rows_come_back_from_either_kind_of_list(most: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = Ragged.from_lengths(np.array([4, 5, 6, 7], np.int32), np.array([3, 0, 1]))
    monkeypatch.setattr("conrec.ragged._LIST_VALUES", most)
    column = rows.to_arrow()
    assert pa.types.is_large_list(column.type) == (most == 3)
    storage.write_table(pa.table({"rows": column}), f"{tmp_path}/rows.parquet", row_group_size=2)
    written = storage.read_table(f"{tmp_path}/rows.parquet")["rows"]
    for read in (column, written, pa.chunked_array([column[:1], column[1:]])):
        again = Ragged.from_arrow(read)
        assert again.values.tolist() == [4, 5, 6, 7] and again.offsets.tolist() == [0, 3, 3, 4]
        assert again.values.dtype == np.int32


@run_settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 6))
def test_blocks_are_whole_rows_that_together_are_all(lengths: np.ndarray, most: int) -> None:
    borders = list(blocks(lengths, most))
    assert [row for first, last in borders for row in range(first, last)] == list(range(len(lengths)))
    # A block ends with the row that reaches the limit, at the latest.
    assert all(lengths[first : last - 1].sum() <= most for first, last in borders)


@run_settings(max_examples=40, deadline=None)
@given(LENGTHS, st.data(), st.integers(1, 6))
def test_distinct_values_are_those_of_a_loop(lengths: np.ndarray, data: st.DataObject, block: int) -> None:
    count = int(lengths.sum())
    values = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)), np.int32)
    rows = Ragged.from_lengths(values, lengths)
    drawn = st.tuples(st.integers(0, len(rows)), st.integers(0, len(rows))).map(sorted)
    spans = np.array(data.draw(st.lists(drawn, max_size=5)), np.int64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("conrec.ragged._BLOCK", block)
        found = distinct(rows, spans[:, 0], spans[:, 1])
    assert [found[place].tolist() for place in range(len(found))] == [
        sorted({int(value) for row in range(first, last) for value in rows[row]}) for first, last in spans
    ]
