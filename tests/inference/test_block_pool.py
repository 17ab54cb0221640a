import pytest

from dualray.inference.block_pool import BlockPool, blocks_for


def test_taken_blocks_are_distinct_and_come_back():
    pool = BlockPool(4)
    first, second = pool.take(3), pool.take(1)
    assert sorted((*first, *second)) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.give_back(first)
    assert sorted(pool.take(3)) == sorted(first)


def test_a_double_return_is_our_bug():
    pool = BlockPool(2)
    blocks = pool.take(1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="not all taken"):
        pool.give_back(blocks)


def test_blocks_for_rounds_up():
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
