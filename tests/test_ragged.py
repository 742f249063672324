"""Rows of different lengths as dense arrays."""

import numpy as np
import pytest

from conrec.ragged import Ragged


@pytest.mark.parametrize("left", [False, True])
def test_padding_with_minus_infinity(left: bool) -> None:
    rows = Ragged.from_lengths(np.array([-1.5, -2.0, -0.25], np.float32), np.array([2, 0, 1]))
    dense = rows.padded(-np.inf, left=left)
    empty = -np.inf
    expected = [[-1.5, -2.0], [empty, empty], [empty, -0.25] if left else [-0.25, empty]]
    assert dense.dtype == np.float32
    assert dense.tolist() == expected


def test_padding_keeps_the_type_of_the_values() -> None:
    rows = Ragged.from_lengths(np.array([7, 8], np.int32), np.array([0, 2]))
    assert rows.padded(-1).dtype == np.int32
    assert rows.padded(-1).tolist() == [[-1, -1], [7, 8]]
    assert Ragged.from_lengths(np.zeros(0, np.float32), np.zeros(3, np.int64)).padded(-np.inf).shape == (3, 0)
