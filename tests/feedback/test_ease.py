"""EASE of blocks of users is that of all of them, to the bit, while float32 counts them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from conrec.feedback.ease import Ease, most_met, together


def histories(users: int, things: int, seed: int) -> sparse.csr_array:
    return sparse.csr_array((np.random.default_rng(seed).random((users, things)) < 0.2).astype(np.float32))


def test_what_was_met_together_is_a_plain_product_in_eight_bytes_a_pair():
    met, columns = histories(50, 12, 0), np.array([1, 2, 5, 11])
    found = together(met, columns)
    among = met.toarray()[:, columns]
    np.testing.assert_array_equal(found.toarray(), np.tril(among.T @ among))
    assert (found.data.dtype, found.indices.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize("cuts", [[], [0, 10], [1, 2, 3, 59]])
def test_however_users_are_divided_the_weights_are_those_of_all(cuts):
    met = histories(60, 12, 1)
    columns = most_met(np.bincount(met.indices, minlength=12), 9)
    blocks = [met[first:last] for first, last in zip([0, *cuts], [*cuts, 60], strict=True)]
    whole = Ease.fit(met, 20.0, 9)
    found = Ease.of_products([together(block, columns) for block in blocks], columns, 12, 20.0)
    assert np.array_equal(found.weights, whole.weights)
    among = met.toarray()[:, columns].astype(np.float64)
    inverse = np.linalg.inv(among.T @ among + 20 * np.eye(9))
    expected = -inverse / np.diag(inverse)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(found.weights, expected, rtol=1e-4, atol=1e-6)


def test_counts_add_up_exactly_to_the_last_that_float32_tells_apart():
    columns, most = np.arange(2), 2**24

    def fitted(*counts):
        products = [sparse.csr_array(np.array([[count, 0], [count // 2, count]], np.float32)) for count in counts]
        return Ease.of_products(products, columns, 2, 0.0).weights

    whole = fitted(most)
    assert np.array_equal(fitted(most - 2, 2), whole)
    assert np.array_equal(fitted(2, most - 6, 2, 2), whole)
    np.testing.assert_allclose(whole, [[0, 0.5], [0.5, 0]], rtol=1e-5)
