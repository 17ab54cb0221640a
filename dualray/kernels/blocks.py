"""Walking rows in blocks that stay in a core's cache between one pass and the next."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BLOCK_NUMEL = 2**18
"""1 MiB of fp32."""


def blocks(like_TD: Tensor, copies: int = 1) -> Iterator[slice]:
    """Slices of T, each so small that `copies` times its rows fit; all of T but on a CPU.

    Elsewhere a pass costs a launch, and there is no cache worth staying in.
    """
    rows, width = like_TD.shape
    step = rows
    if like_TD.device.type == "cpu":
        step = _BLOCK_NUMEL // max(copies * width, 1)
    step = max(step, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
