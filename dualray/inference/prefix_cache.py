"""Which full blocks hold which beginnings of text.

Equal beginnings have equal latents, so a block that is full can serve every sequence that
begins with the same tokens. It is known by a key: SHA-256 over the key of the block before it
and its own token ids, which stands for all tokens up to its end and which nobody can make
collide with somebody else's prompt. Blocks that no sequence refers to stay known until
somebody needs them, the longest unused first.

Rows of MTP layers lie in the same blocks but are not shared: each depends on the token behind
it too, which for a block's last row may be another one in the sequence that reuses it. The
modules begin anew behind what was reused (`Speculation`), which costs acceptance at most.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256

Key = bytes


def extend_keys(keys: list[Key], ids: Sequence[int], count: int, block_size: int) -> None:
    """Appends to `keys` until there is one for each of the first `count` blocks of `ids`."""
    for index in range(len(keys), count):
        part = array("q", ids[index * block_size : (index + 1) * block_size]).tobytes()
        keys.append(sha256((keys[-1] if keys else b"") + part).digest())


class PrefixCache:
    """Known blocks by key, and the order in which those that nobody uses are given up.

    Whoever uses a block uses all before it and gives them back together, last block first: so a
    block is never given up before one that follows it. (The exception are twins: two sequences
    that chose the same tokens at the same time hold a block each, of which one is known. What
    follows the other may outlive it, unreachable and next in line.)
    """

    def __init__(self) -> None:
        self._blocks: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Known blocks that nobody uses."""
        return len(self._idle)

    def find(self, key: Key) -> int | None:
        return self._blocks.get(key)

    def knows(self, block: int) -> bool:
        return block in self._keys

    def add(self, key: Key, block: int) -> None:
        """Makes a full block known that somebody uses; the first of equal blocks stays."""
        if key not in self._blocks and block not in self._keys:
            self._blocks[key] = block
            self._keys[block] = key

    def use(self, block: int) -> None:
        """A known block is in use from now on."""
        del self._idle[block]

    def leave(self, block: int) -> None:
        """Nobody uses a known block any more."""
        self._idle[block] = None

    def evict(self) -> int:
        """Forgets the block that has been idle for longest and returns it."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Nobody finds the block any more; who uses it goes on."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    def check(self, num_references: Sequence[int]) -> None:
        """Asserts that exactly the known blocks without a reference are idle."""
        assert {block: key for key, block in self._blocks.items()} == self._keys
        assert set(self._idle) == {b for b in self._keys if not num_references[b]}
