"""The latent cache's blocks: who uses them, and which are free.

A block holds `block_size` tokens' latents of every layer of a stage. One pool per owner
(replica, expert rank, direction): the same block ids are valid in each pipeline stage that
the owner's requests visit, since every stage copy has its own tensor of equal shape.

Sequences with the same beginning share its blocks, which are counted: a block is free when
its last user gives it back. Full ones stay known to the prefix cache and are taken last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dualray.inference.prefix_cache import Key, PrefixCache

_EVICTED_PART = 64
"""A 64th of the pool is given up together: one by one, no two of a new sequence's blocks would
be neighbours."""


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1 and counts their users.

    A sequence's blocks are neighbours where that can be had, because attention reads such rows in
    place and copies others.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._free = bytearray(b"\x01" * num_blocks)
        """1 for blocks that nobody uses and nobody can find."""
        self._num_free = num_blocks
        self._next = 0
        self._known = PrefixCache()

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: nobody uses them, but some may still be found again."""
        return self._num_free + self._known.num_idle

    def is_used(self, block: int) -> bool:
        return self._num_references[block] > 0

    def take(self, after: int | None, num_wanted: int) -> int:
        """A free block; the caller has checked `num_free`.

        It follows the sequence's last block `after` if that can be, or else begins a row of up to
        `num_wanted` free ones, which are all that the sequence may still take.
        """
        if not self._num_free:
            for _ in range(min(max(1, self.num_blocks // _EVICTED_PART), self._known.num_idle)):
                self._set_free(self._known.evict())
        assert self._num_free, "a block asked, and none is free"
        block = -1 if after is None else after + 1
        if not (0 <= block < self.num_blocks and self._free[block]):
            block = self._begin(num_wanted)
        self._free[block] = 0
        self._num_free -= 1
        self._num_references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence uses a known block."""
        if not self._num_references[block]:
            self._known.use(block)
        self._num_references[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """A sequence's blocks in order of position; one that it does not use is our bug."""
        for block in reversed(blocks):
            assert self._num_references[block] > 0, f"block {block} is not taken"
            self._num_references[block] -= 1
            if self._num_references[block]:
                continue
            if self._known.knows(block):
                self._known.leave(block)
            else:
                self._set_free(block)

    def find(self, key: Key) -> int | None:
        """The block that holds the tokens of `key`, if there is one."""
        return self._known.find(key)

    def make_known(self, key: Key, block: int) -> None:
        """A full block in use can be found from now on."""
        assert self._num_references[block] > 0, f"block {block} is not taken"
        self._known.add(key, block)

    def forget(self, blocks: Iterable[int]) -> None:
        """Blocks in use cannot be found any more."""
        for block in blocks:
            assert self._num_references[block] > 0, f"block {block} is not taken"
            self._known.forget(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that the blocks in use are exactly those of `tables`, and nothing is lost."""
        counts = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a block is twice in {table}"
            for block in table:
                counts[block] += 1
        assert counts == self._num_references, "references were lost"
        self._known.check(counts)
        free = [not n and not self._known.knows(b) for b, n in enumerate(counts)]
        assert list(map(bool, self._free)) == free, "blocks were lost"
        assert self._num_free == sum(free)

    def _begin(self, num_wanted: int) -> int:
        """The first of `num_wanted` free neighbours behind those begun before, or of fewer."""
        length = max(1, min(num_wanted, self._num_free))
        while True:
            run = b"\x01" * length
            block = self._free.find(run, self._next)
            if block < 0:
                block = self._free.find(run)
            if block >= 0:
                self._next = block + length
                return block
            length //= 2

    def _set_free(self, block: int) -> None:
        self._free[block] = 1
        self._num_free += 1


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
