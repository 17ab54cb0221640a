"""The shuffle is a bijection for every n and key, and looks like one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.data.permutation import permute


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 5000), key=st.text(max_size=8))
def test_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert image.dtype == np.int64
    assert (np.sort(image) == np.arange(n)).all()


@settings(deadline=None)
@given(n=st.integers(2, 1 << 62), start=st.integers(0, 1 << 62), key=st.text(max_size=8))
def test_any_size_and_any_part(n, start, key):
    index = np.unique((start + np.arange(40)) % n)
    image = permute(index, n, key)
    assert (image >= 0).all()
    assert (image < n).all()
    assert len(np.unique(image)) == len(index)
    one_by_one = [int(permute(index[i : i + 1], n, key)[0]) for i in range(len(index))]
    assert image.tolist() == one_by_one


def test_pinned():
    """Resuming an old checkpoint relies on these never changing."""
    assert permute(np.arange(10), 10, "key").tolist() == [4, 3, 0, 9, 8, 5, 6, 1, 7, 2]


def test_keys_and_neighbours_are_unrelated():
    n = 100_000
    index = np.arange(n)
    one, other = permute(index, n, "data/0/1"), permute(index, n, "data/0/2")
    # A random pair of permutations agrees in one place on average; correlations are about
    # n^-0.5 = 0.003, and 0.02 is six sigma.
    assert (one == other).sum() < 10
    assert (one == index).sum() < 10
    for first, second in ((one, other), (one, index), (one[1:], one[:-1])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.02
    # Each tenth of the epoch draws evenly from each tenth of the data: chi-square with 81 degrees
    # of freedom has mean 81 and deviation 13.
    table = np.histogram2d(index, one, bins=10)[0]
    assert ((table - n / 100) ** 2 / (n / 100)).sum() < 81 + 6 * 13
