import pytest

from dualray.inference.block_pool import BlockPool, blocks_for


def take(pool: BlockPool, count: int) -> tuple[int, ...]:
    """A sequence's first blocks."""
    blocks: list[int] = []
    while len(blocks) < count:
        blocks.append(pool.take(blocks[-1] if blocks else None, count - len(blocks)))
    return tuple(blocks)


def test_taken_blocks_are_distinct_and_come_back():
    pool = BlockPool(4)
    first, second = take(pool, 3), take(pool, 1)
    assert sorted((*first, *second)) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.give_back(first)
    assert sorted(take(pool, 3)) == sorted(first)
    pool.check([first, second])


def test_a_double_return_is_our_bug():
    pool = BlockPool(2)
    blocks = take(pool, 1)
    pool.give_back(blocks)
    with pytest.raises(AssertionError, match="is not taken"):
        pool.give_back(blocks)


def test_a_shared_block_is_free_when_its_last_user_gives_it_back():
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    pool.make_known(b"key", block)
    pool.share(block)
    pool.check([(block,), (block,)])
    pool.give_back((block,))
    assert pool.num_free == 1
    pool.give_back((block,))
    assert pool.num_free == 2
    assert pool.find(b"key") == block


def test_blocks_that_may_be_found_again_are_taken_last_and_the_longest_unused_first():
    pool = BlockPool(4)
    chain = take(pool, 3)
    for index, block in enumerate(chain):
        pool.make_known(b"chain%d" % index, block)
    pool.give_back(chain)
    assert pool.num_free == 4
    assert pool.take(None, 1) not in chain
    # Given back together, the last block of the chain goes first: the others need not know it.
    assert [pool.take(None, 1) for _ in range(2)] == [chain[2], chain[1]]
    assert [pool.find(b"chain%d" % index) for index in range(3)] == [chain[0], None, None]


def test_a_used_block_is_no_longer_up_for_eviction():
    pool = BlockPool(2)
    first, second = take(pool, 2)
    pool.make_known(b"first", first)
    pool.make_known(b"second", second)
    pool.give_back((first,))
    pool.give_back((second,))
    pool.share(first)
    assert pool.take(None, 1) == second
    assert pool.find(b"first") == first
    pool.check([(first,), (second,)])


def test_forgotten_blocks_are_not_found_and_free_when_given_back():
    pool = BlockPool(1)
    (block,) = take(pool, 1)
    pool.make_known(b"key", block)
    pool.forget((block,))
    assert pool.find(b"key") is None
    pool.give_back((block,))
    assert take(pool, 1) == (block,)


def test_the_first_of_equal_blocks_stays_known():
    pool = BlockPool(2)
    first, second = take(pool, 2)
    pool.make_known(b"key", first)
    pool.make_known(b"key", second)
    assert pool.find(b"key") == first
    pool.give_back((first,))
    pool.give_back((second,))
    pool.check([])


def test_a_growing_sequence_keeps_to_neighbours_while_others_grow():
    pool = BlockPool(12)
    tables = [[pool.take(None, 4)] for _ in range(3)]
    for left in (3, 2, 1):
        for table in tables:
            table.append(pool.take(table[-1], left))
    for table in tables:
        assert table == list(range(table[0], table[0] + 4))


def test_neighbours_are_found_among_evicted_blocks():
    pool = BlockPool(256)  # of which 4 are evicted together
    whole = take(pool, 256)
    for block in whole:
        pool.make_known(b"%d" % block, block)
    pool.give_back(whole)
    table = take(pool, 4)
    assert table == (252, 253, 254, 255)
    assert pool.num_free == 252
    assert pool.find(b"251") == 251


def test_a_lost_reference_is_noticed():
    pool = BlockPool(2)
    blocks = take(pool, 1)
    pool.check([blocks])
    with pytest.raises(AssertionError, match="references were lost"):
        pool.check([])


def test_blocks_for_rounds_up():
    assert [blocks_for(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
