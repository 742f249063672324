"""A hash of identifiers that is the same in every process, on every machine and in every version.

It decides which users are validation users, so a user must never change sides between runs. It is not
cryptographic. The loop runs over byte positions of the longest identifier, never over identifiers.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

_MASK = (1 << 64) - 1


def stable_hash(ids: pa.Array) -> np.ndarray:
    """FNV-1a over the UTF-8 bytes, finished with the 64-bit mix of MurmurHash3.

    Shape: ids (N,) string without nulls -> (N,) uint64.
    """
    ids = ids.cast(pa.large_string())
    data = np.frombuffer(ids.buffers()[2] or b"", np.uint8)
    offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset : ids.offset + len(ids) + 1]
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.full(len(ids), 0xCBF29CE484222325, np.uint64)
    # Longest first: the identifiers that still have a byte at a position are a prefix.
    order = np.argsort(-lengths, kind="stable")
    reach = np.searchsorted(-lengths[order], -np.arange(int(lengths.max(initial=0))), side="left")
    for position, count in enumerate(reach):
        rows = order[:count]
        hashes[rows] = (hashes[rows] ^ data[starts[rows] + position]) * np.uint64(0x100000001B3)
    return mix(hashes)  # FNV alone leaves the high bits of short identifiers alike


def mix(values: np.ndarray) -> np.ndarray:
    """The 64-bit finish of MurmurHash3: every bit of a value changes every bit of the result. Shape: (N,) uint64."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return np.asarray(values ^ (values >> np.uint64(33)))


def stable_hash_of(text: str) -> int:
    """`stable_hash` of one identifier, without arrays: a few microseconds, for a request that is served."""
    value = 0xCBF29CE484222325
    for byte in text.encode(errors="surrogatepass"):
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value = ((value ^ (value >> 33)) * factor) & _MASK
    return value ^ (value >> 33)
