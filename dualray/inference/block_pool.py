"""Free list of latent-cache blocks.

A block holds `block_size` tokens' latents of every layer of a stage. One pool per owner
(replica, expert rank, direction): the same block ids are valid in each pipeline stage that
the owner's requests visit, since every stage copy has its own tensor of equal shape.
"""

from __future__ import annotations

from collections import deque


class BlockPool:
    """Hands out block ids 0 .. num_blocks - 1; freed ones go to the back of the line."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """`count` free blocks; the caller has checked `num_free`."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = tuple(self._free.popleft() for _ in range(count))
        self._taken.update(blocks)
        return blocks

    def give_back(self, blocks: tuple[int, ...]) -> None:
        """Returns blocks that `take` handed out; a double return is our bug."""
        assert self._taken.issuperset(blocks), f"blocks {blocks} are not all taken"
        self._taken.difference_update(blocks)
        self._free.extend(blocks)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)
