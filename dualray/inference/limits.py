"""How much an owner of requests can hold and run."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.inference.block_pool import blocks_for


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one owner can hold and run; the same for all owners."""

    num_blocks: int
    """Blocks in an owner's pool."""
    block_size: int
    """Tokens per block."""
    max_batch: int
    """Sequences that an owner runs together."""
    max_context: int
    """Longest prompt plus completion, in tokens."""
    max_step_tokens: int = 2048
    """Tokens of one owner in one step; a longer prompt runs in several steps."""
    max_waiting: int = 1024
    """Requests that may wait for admission, over all owners."""
    prefix_cache: bool = True
    """Whether blocks of the same beginning are shared and kept for later requests."""
    draft_tokens: int = 0
    """Most tokens that the MTP modules draft behind a sequence in a step; 0 for none."""
    draft_modules: int = 0
    """MTP modules that take part in it; at most draft_tokens."""

    def __post_init__(self) -> None:
        # A request of full length must fit, and decoding must never be crowded out.
        assert self.num_blocks >= blocks_for(self.max_context, self.block_size)
        assert self.max_step_tokens >= self.max_batch >= 1
