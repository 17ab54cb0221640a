"""A keyed shuffle of range(n) that is computed, not stored.

A Feistel network permutes 2h-bit numbers for any round function; n is reached by *cycle-walking*:
what lands at or above n is permuted again until it lands below (Black and Rogaway 2002). As 4^h is
below 4n, that takes under four rounds of walking on average. No state, no memory of size n.
"""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """Image of each index (int64, any shape, in [0, n)) under the permutation that `key` names."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    value = _feistel(index.astype(np.uint64).ravel(), half_bits, keys)
    while len(outside := np.flatnonzero(value >= np.uint64(n))):
        value[outside] = _feistel(value[outside], half_bits, keys)
    return value.astype(np.int64).reshape(index.shape)


def _round_keys(key: str) -> np.ndarray:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS, person=b"dualray.shuffle")
    return np.frombuffer(digest.digest(), dtype="<u8")


def _feistel(value: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for key in keys:
        # splitmix64's finaliser: all bits of the mixed half reach the low ones.
        mixed = (right ^ key) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_2
        mixed ^= mixed >> np.uint64(32)
        left, right = right, (left ^ mixed) & mask
    return (left << shift) | right
