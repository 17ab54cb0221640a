"""Sets of token ids as packed bits, the form in which they travel to the sampler.

Bit i % 8 of byte i // 8 stands for token i, least significant bit first; a token behind the end
is not in the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np


def mask_of(ids: Iterable[int]) -> bytes:
    """The set of these ids."""
    found = np.fromiter(ids, np.int64)
    if not found.size:
        return b""
    bits = np.zeros(int(found.max()) + 1, np.bool_)
    bits[found] = True
    return np.packbits(bits, bitorder="little").tobytes()


def without(mask: bytes, ids: Iterable[int]) -> bytes:
    """The set without these ids; the set itself if none would be left."""
    left = bytearray(mask)
    for token in ids:
        if token // 8 < len(left):
            left[token // 8] &= ~(1 << token % 8)
    return bytes(left) if any(left) else mask


def ids_in(mask: bytes) -> Iterator[int]:
    """The ids, ascending."""
    for index, byte in enumerate(mask):
        while byte:
            lowest = byte & -byte
            yield 8 * index + lowest.bit_length() - 1
            byte ^= lowest
