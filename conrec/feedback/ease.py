"""EASE: what a user will meet next, from what users met together (Steck 2019, arXiv 1905.03375).

    ease = Ease.fit(met, ridge=200.0, most=15_000)      # met: users x things, 0/1
    ease.scores(history)                                 # histories x things

scores = x B with B = I - P / diag(P), P = (X'X + ridge I)^-1: the one matrix without a diagonal that best tells each
thing a user met from the others. Invariant: things that nobody met, and those beyond the `most` most met, score 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import lapack


@dataclass(frozen=True)
class Ease:
    """A fitted model. Shape: columns (C,) int64 ascending, which of the `count` things take part; weights (C, C)."""

    count: int
    columns: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, met: sparse.csr_array, ridge: float, most: int) -> Ease:
        """Fits on who met what. Shape: met (U, N), 0/1. Memory is that of two (C, C) float32 matrices, C <= most."""
        users = np.bincount(met.indices, minlength=met.shape[1])
        columns = most_met(users, most)
        return cls.of_products([together(met, columns)], columns, users.size, ridge)

    @classmethod
    def of_products(cls, products: Iterable[sparse.csr_array], columns: np.ndarray, count: int, ridge: float) -> Ease:
        """The same of what `together` says of blocks of users, no user in two of them.

        The same numbers however users are divided, since whole numbers add up exactly in float32, while nothing was met
        by more than 2^24 users; beyond, a sum is off by its rounding, 6e-8 of it a block.
        One product is added at a time, with 12 bytes a pair beside it.
        """
        # Float32 and in place, since this matrix is the memory of the whole fit; its condition is mild, as the ridge
        # is far above float32 noise on counts.
        flat = np.zeros(len(columns) ** 2, np.float32)
        for product in products:
            # One index, ascending row by row: as little as a tenth of the time that two take.
            places = np.repeat(np.arange(len(columns)) * len(columns), np.diff(product.indptr))
            places += product.indices
            flat[places] += product.data
        # The lower triangle row by row is the upper one column by column, as LAPACK has it.
        gram = flat.reshape(len(columns), len(columns)).T
        gram[np.diag_indices_from(gram)] += ridge
        if len(columns):
            gram = lapack.spotrf(gram, lower=0, overwrite_a=1)[0]
            gram = lapack.spotri(gram, lower=0, overwrite_c=1)[0]
        # LAPACK reads and leaves the upper triangle alone.
        for column in range(len(columns)):
            gram[column + 1 :, column] = gram[column, column + 1 :]
        # Symmetric, and so its transpose, whose rows are contiguous: what is multiplied by histories block by block.
        gram = gram.T
        gram /= -np.diag(gram).copy()
        gram[np.diag_indices_from(gram)] = 0
        return cls(count, columns, gram)

    def scores(self, met: sparse.csr_array) -> np.ndarray:
        """Scores of all things. Shape: met (B, N) -> (B, N) float32."""
        result = np.zeros((met.shape[0], self.count), np.float32)
        result[:, self.columns] = met[:, self.columns] @ self.weights
        return result


def most_met(users: np.ndarray, most: int) -> np.ndarray:
    """The `most` most met of things that anybody met, ascending. Shape: users (N,) who met each -> (C,) int64."""
    return np.sort(np.argsort(-users, kind="stable")[: min(most, np.count_nonzero(users))])


def together(met: sparse.csr_array, columns: np.ndarray) -> sparse.csr_array:
    """How many users met both of two things, the pairs of the lower triangle.

    Shape: met (U, N), 0/1 -> (C, C) float32 with int32 indices: 8 bytes a pair that anybody met.
    """
    among = met[:, columns]
    pairs = sparse.tril(among.T @ among, format="csr")
    return sparse.csr_array((pairs.data, pairs.indices.astype(np.int32), pairs.indptr), shape=pairs.shape)
