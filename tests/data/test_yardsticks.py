"""The four yardsticks against slow twins."""

import bz2
import gzip
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from dualray.data.dataset import TokenDataset
from dualray.data.shards import build
from dualray.data.yardsticks import bigram_bits, bits_per_byte, unigram, yardsticks


def slow_bigram(train: list[int], test: list[int], vocab_size: int) -> tuple[float, list]:
    """Interpolated absolute discounting with dictionaries; also p(.|a) for every context."""
    counts = Counter(train)
    base = [(counts[t] + 1) / (len(train) + vocab_size) for t in range(vocab_size)]
    pairs = Counter(pairwise(train))
    after = defaultdict(dict)
    for (a, b), count in pairs.items():
        after[a][b] = count
    once = sum(count == 1 for count in pairs.values())
    twice = sum(count == 2 for count in pairs.values())
    d = once / (once + 2 * twice) if once else 0.5

    def p(b: int, a: int) -> float:
        if a not in after:
            return base[b]
        total = sum(after[a].values())
        kept = max(after[a].get(b, 0) - d, 0) / total
        return kept + d * len(after[a]) / total * base[b]

    rows = [[p(b, a) for b in range(vocab_size)] for a in range(vocab_size)]
    return sum(-math.log2(rows[a][b]) for a, b in pairwise(test)), rows


@pytest.mark.parametrize("seed", range(5))
def test_bigram_equals_its_slow_twin_and_is_a_distribution(seed):
    rng = np.random.default_rng(seed)
    V = 12
    # Tokens 10 and 11 are absent from training: an unseen context and unseen pairs.
    train_T = (rng.integers(0, 10, 400) * rng.random(400)).astype(np.int64)
    test_T = rng.integers(0, V, 300)
    bits, rows = slow_bigram(train_T.tolist(), test_T.tolist(), V)
    assert np.allclose(np.sum(rows, axis=1), 1)
    base_V = unigram(train_T, V)
    assert math.isclose(base_V.sum(), 1)
    assert math.isclose(bigram_bits(train_T, test_T, base_V), bits, rel_tol=1e-12)


def test_on_shards(dataset):
    found = yardsticks(dataset)
    text = dataset.heldout_text()
    assert list(found) == ["gzip", "bzip2", "unigram", "bigram"]
    # The header of gzip.compress is as long as ours; only the time stamp in it differs.
    assert found["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert found["bzip2"] == 8 * len(bz2.compress(text, 9)) / len(text)
    train = dataset.tokens("train", 0, 10**9).tolist()
    test = dataset.tokens("heldout", 0, 10**9).tolist()
    assert math.isclose(
        found["bigram"], slow_bigram(train, test, 257)[0] / len(text), rel_tol=1e-12
    )
    counts = Counter(train)
    bits = -sum(math.log2((counts[t] + 1) / (len(train) + 257)) for t in test[1:])
    assert math.isclose(found["unigram"], bits / len(text), rel_tol=1e-12)


def test_better_tokens_lower_the_unigram(corpus, dataset, tmp_path):
    build([corpus[0]], "bpe:270", tmp_path / "out")
    better = yardsticks(TokenDataset.open(tmp_path / "out"))
    plain = yardsticks(dataset)
    assert better["unigram"] < plain["unigram"]
    assert (better["gzip"], better["bzip2"]) == (plain["gzip"], plain["bzip2"])


def test_bits_per_byte():
    assert bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)
