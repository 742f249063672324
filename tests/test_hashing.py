"""The stable hash: pinned values, no dependence on neighbours, an even spread."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from conrec.hashing import stable_hash


def murmur_mixed_fnv(text: str) -> int:
    """The same hash for one identifier, in plain integers."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = (value ^ value >> 33) * factor % 2**64
    return value ^ value >> 33


def test_equals_the_plain_form_whatever_lies_beside():
    ids = ["", "a", "u12345", "ключ", "u1", "0", "u12345", "x" * 300]
    hashes = stable_hash(pa.array(ids))
    assert hashes.tolist() == [murmur_mixed_fnv(text) for text in ids]
    assert stable_hash(pa.array(ids).slice(2, 3)).tolist() == hashes[2:5].tolist()
    assert stable_hash(pa.array([], pa.string())).tolist() == []


def test_spreads_consecutive_numbers_evenly():
    hashes = stable_hash(pa.array(np.arange(100_000)).cast(pa.string()))
    tenths = np.bincount((hashes / 2**64 * 10).astype(int), minlength=10)
    assert abs(tenths - 10_000).max() < 500
    assert len(np.unique(hashes)) == 100_000
