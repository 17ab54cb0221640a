"""Bits per byte that a model must beat: gzip, bzip2, a unigram and a bigram model.

All four are measured on the same held-out text. The compressors get that text alone (they have
no training). The n-gram models count the training tokens, at most `MAX_TRAINING_TOKENS` of them,
are asked for every held-out token but the very first (which is the opening end-of-document), and
their bits are divided by the text's bytes: exactly how the model's held-out loss is reported.
"""

from __future__ import annotations

import bz2
import math
import zlib

import numpy as np

from dualray.data.dataset import TokenDataset

MAX_TRAINING_TOKENS = 1 << 25


def yardsticks(dataset: TokenDataset) -> dict[str, float]:
    """Bits per byte of `gzip` (level 9), `bzip2` (level 9), `unigram` and `bigram`."""
    heldout = dataset.split("heldout")
    text = dataset.heldout_text()
    train_T = dataset.tokens("train", 0, MAX_TRAINING_TOKENS).astype(np.int64)
    test_T = dataset.tokens("heldout", 0, heldout.num_tokens).astype(np.int64)
    unigram_V = unigram(train_T, dataset.vocab_size)
    bits = {
        "gzip": 8.0 * _gzip_bytes(text),
        "bzip2": 8.0 * len(bz2.compress(text, 9)),
        "unigram": float(-np.log2(unigram_V[test_T[1:]]).sum()),
        "bigram": bigram_bits(train_T, test_T, unigram_V),
    }
    return {name: value / heldout.num_bytes for name, value in bits.items()}


def bits_per_byte(loss_sum: float, num_bytes: float) -> float:
    """From a sum of cross entropies in nats over a text to bits per byte of the text."""
    return loss_sum / math.log(2) / num_bytes


def _gzip_bytes(text: bytes) -> int:
    compressor = zlib.compressobj(9, wbits=31)
    return len(compressor.compress(text)) + len(compressor.flush())


def unigram(train_T: np.ndarray, vocab_size: int) -> np.ndarray:
    """Probability of each token, one added to every count: (V,) float64."""
    counts_V = np.bincount(train_T, minlength=vocab_size) + 1.0
    return counts_V / counts_V.sum()


def bigram_bits(train_T: np.ndarray, test_T: np.ndarray, unigram_V: np.ndarray) -> float:
    """Bits of `test_T[1:]`, each token given the one before it.

    Interpolated absolute discounting: p(b|a) = max(c(ab) - d, 0) / c(a) + d n(a) / c(a) p(b), with
    n(a) the number of different followers of a, and d = n1 / (n1 + 2 n2) from the numbers of pairs
    seen once and twice (Ney, Essen and Kneser 1994). A context never seen leaves p(b).
    """
    V = len(unigram_V)
    pairs, counts = np.unique(train_T[:-1] * V + train_T[1:], return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once else 0.5
    total_V = np.bincount(train_T[:-1], minlength=V).astype(np.float64)
    followers_V = np.bincount(pairs // V, minlength=V)

    context_T, next_T = test_T[:-1], test_T[1:]
    wanted_T = context_T * V + next_T
    at_T = np.minimum(np.searchsorted(pairs, wanted_T), len(pairs) - 1)
    count_T = np.where(pairs[at_T] == wanted_T, counts[at_T], 0)
    seen_T = np.maximum(total_V[context_T], 1.0)
    back_T = np.where(total_V[context_T] > 0, discount * followers_V[context_T] / seen_T, 1.0)
    p_T = np.maximum(count_T - discount, 0) / seen_T + back_T * unigram_V[next_T]
    return float(-np.log2(p_T).sum())
