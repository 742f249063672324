"""Rows of different lengths as two arrays, the layout of an Arrow list column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_BLOCK = 1 << 22
"""Values that `distinct` looks at together."""
_LIST_VALUES = np.iinfo(np.int32).max
"""Values that an Arrow list column holds at most, its offsets being int32."""


@dataclass(frozen=True)
class Ragged:
    """Row i is `values[offsets[i]:offsets[i + 1]]`.

    Shape: values (N,), offsets (R + 1,) int64, offsets[0] = 0 and offsets[-1] = N.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """Rows of the given lengths (R,), taken from `values` in order."""
        return cls(values, np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))))

    @classmethod
    def from_rows(cls, rows: np.ndarray, values: np.ndarray, row_count: int) -> Ragged:
        """Groups `values` (N,) by ascending `rows` (N,), which name the row of each value."""
        return cls.from_lengths(values, np.bincount(rows, minlength=row_count))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, shape (R,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Row of each value, shape (N,)."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The rows at the given positions, in that order."""
        return Ragged.from_lengths(self.values[ranges(self.offsets[rows], self.lengths[rows])], self.lengths[rows])

    def padded(self, fill: float) -> np.ndarray:
        """A dense (R, longest) array filled with `fill` at the end."""
        lengths = self.lengths
        dense = np.full((len(self), int(lengths.max(initial=0))), fill, self.values.dtype)
        dense[self.rows, places(lengths)] = self.values
        return dense

    def to_arrow(self) -> pa.ListArray | pa.LargeListArray:
        """The same rows as an Arrow list column, a large one where there are more values than int32 counts."""
        if self.offsets[-1] > _LIST_VALUES:
            return pa.LargeListArray.from_arrays(pa.array(self.offsets, pa.int64()), pa.array(self.values))
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.values))

    @classmethod
    def from_arrow(cls, column: pa.ListArray | pa.LargeListArray | pa.ChunkedArray) -> Ragged:
        """An Arrow list column without nulls as Ragged."""
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)
        return cls(values[offsets[0] : offsets[-1]], offsets - offsets[0])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenated aranges: start_i, start_i + 1, ..., start_i + length_i - 1 for each i."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.arange(total) + np.repeat(starts - (ends - lengths), lengths))


def places(lengths: np.ndarray) -> np.ndarray:
    """The place of each value in its row: 0, 1, ..., length_i - 1 for each i. Shape: (R,) -> (N,) int64."""
    return ranges(np.zeros(len(lengths), np.int64), lengths)


def pairs(rows: np.ndarray, values: np.ndarray | int, width: int) -> np.ndarray:
    """One integer for each row and value, ordered as the pairs are; `np.divmod(key, width)` gives both back.

    Shape: rows and values (N,), or what broadcasts with them, values in [0, width); returns int64.
    """
    return rows.astype(np.int64) * width + values


def distinct(values: Ragged, firsts: np.ndarray, lasts: np.ndarray) -> Ragged:
    """The distinct values of rows firsts_i to lasts_i - 1, ascending, a row for each i.

    Shape: firsts and lasts (A,) -> A rows int32 of non-negative values. Memory is bounded by a block of ranges.
    """
    starts = values.offsets[firsts]
    lengths = values.offsets[lasts] - starts
    width = int(values.values.max(initial=0)) + 1
    counts, kept = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for first, last in blocks(lengths, _BLOCK):
        block = slice(first, last)
        rows = np.repeat(np.arange(last - first), lengths[block])
        keys = np.unique(pairs(rows, values.values[ranges(starts[block], lengths[block])], width))
        counts.append(np.bincount(keys // width, minlength=last - first))
        kept.append((keys % width).astype(np.int32))
    return Ragged.from_lengths(np.concatenate(kept), np.concatenate(counts))


def blocks(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows that hold about `most` values each, whatever the rows' lengths."""
    work = np.concatenate(([0], np.cumsum(lengths)))
    borders = np.searchsorted(work, np.arange(1, work[-1] // most + 1) * most)
    borders = np.unique(np.concatenate(([0], borders, [len(lengths)])))
    yield from zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
