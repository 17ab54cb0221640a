import math

import pytest
import torch

from dualray.inference import noise
from dualray.inference.noise import exponentials

CPU = torch.device("cpu")
MASK = 2**64 - 1


def finalised(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def twin(seed: int, position: int, token: int) -> float:
    """The same number in whole numbers without a sign."""
    gamma = 0x9E3779B97F4A7C15
    stream = finalised((seed + gamma) & MASK)
    stream = finalised(((stream ^ position) + gamma) & MASK)
    bits = finalised((stream + (token + 1) * gamma) & MASK)
    return -math.log(((bits >> 12) + 0.5) / 2**52)


def test_the_finaliser_is_splitmix64s():
    # The first outputs of the published generator seeded with 1234567.
    gamma = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [finalised((1234567 + i * gamma) & MASK) for i in (1, 2, 3)] == expected


@pytest.fixture(params=["numpy", "torch"])
def library(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(noise, "_by_numpy", lambda s, n: noise._by_torch(s, n, CPU))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("seed", [0, 7, -3, 2**63, 2**64 - 1, 10**30])
def test_numbers_are_those_of_unsigned_arithmetic(seed):
    got = exponentials([(seed, 0), (seed, 41)], 200, CPU)
    for row, position in enumerate((0, 41)):
        expected = [twin(seed, position, token) for token in range(200)]
        # Logarithms of different libraries may differ in the last bit.
        torch.testing.assert_close(
            got[row], torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
        )


def test_a_number_depends_on_its_own_key_and_token_alone():
    both = exponentials([(1, 5), (2, 5)], 300, CPU)
    assert torch.equal(exponentials([(2, 5)], 120, CPU)[0], both[1, :120])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(exponentials([(1, 6)], 300, CPU)[0], both[0])


def test_numbers_are_exponential_across_tokens_positions_and_seeds():
    tokens = exponentials([(3, 9)], 20_000, CPU)[0]
    positions = exponentials([(3, p) for p in range(20_000)], 1, CPU)[:, 0]
    seeds = exponentials([(s, 9) for s in range(20_000)], 1, CPU)[:, 0]
    for values in (tokens, positions, seeds):
        assert values.min() > 0
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed in 999 of 1000 such samples.
        cdf = 1 - torch.exp(-values.sort().values)
        steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
        assert (cdf - steps).abs().max() < 1.95 / math.sqrt(len(values))
