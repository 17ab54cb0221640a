"""Decoding on a CPU: cached rows of several sequences, copied side by side and attended at once.

Attention of one row over 300 cached ones takes torch some 30 us, most of it to begin, and uses one
core however many there are. Copied into one tensor, 16 sequences take 230 us on one core of an
AMD EPYC and 180 on two, instead of 540 and 950. The copies should stay in the processor's cache,
so a step's sequences are cut into bunches of like lengths; a single one is read in place.

n sequences, S positions of the longest, R query heads, L row width, k key width, c value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_ROWS = 8192
"""Copied rows of a bunch of several, padding included: 2.6 MB of the demo's."""


@dataclass(frozen=True, kw_only=True)
class Bunch:
    """Sequences with one new token each.

    `blocks_N` are their blocks, each sequence's as many as the longest one's: what is behind its
    own is any block. `outside_nS` is true for positions that a sequence does not have. `rows_n`
    are its rows of the step, None if they are all.
    """

    rows_n: Tensor | None
    blocks_N: Tensor
    outside_nS: Tensor


def cut(num_blocks: Sequence[int], block_size: int) -> list[list[int]]:
    """Sequences by bunch, given how many blocks each has: in their order if all are in one."""
    everyone = list(range(len(num_blocks)))
    if len(everyone) * max(num_blocks, default=0) * block_size <= MAX_ROWS:
        return [everyone] if everyone else []
    bunches: list[list[int]] = []
    for index in sorted(everyone, key=lambda index: -num_blocks[index]):
        # The first of a bunch is its longest.
        if bunches:
            padded = (len(bunches[-1]) + 1) * num_blocks[bunches[-1][0]] * block_size
            if padded <= MAX_ROWS:
                bunches[-1].append(index)
                continue
        bunches.append([index])
    return bunches


def make_bunch(
    rows: Sequence[int] | None,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    block_size: int,
) -> Bunch:
    """Sequences by their blocks and how many positions they have, the new one included."""
    width = max(map(len, tables))
    padded = [block for table in tables for block in (*table, *(table[-1],) * (width - len(table)))]
    position_S = torch.arange(width * block_size)
    return Bunch(
        rows_n=None if rows is None else torch.tensor(rows),
        blocks_N=torch.tensor(padded),
        outside_nS=position_S >= torch.tensor(lengths)[:, None],
    )


def rows_of(bunch: Bunch, blocks: Tensor) -> Tensor:
    """The cached rows (n, S, L), copied from (num_blocks, block_size, L)."""
    # Much faster than blocks[tables], which copies element by element.
    copied = blocks.index_select(0, bunch.blocks_N)
    return copied.view(*bunch.outside_nS.shape, blocks.shape[-1])


def attend(
    q_nRk: Tensor, k_nSk: Tensor, v_nSc: Tensor, outside_nS: Tensor | None, scale: float
) -> Tensor:
    """(n, R, c), over all positions where `outside_nS` is None.

    NaN where a position outside holds no number, as a reused block may: a weight of zero does not
    silence it, and to look for it here would cost as much as attending.
    """
    scores_nRS = torch.bmm(q_nRk * scale, k_nSk.transpose(1, 2))
    if outside_nS is not None:
        scores_nRS.masked_fill_(outside_nS[:, None], -torch.inf)
    return torch.bmm(torch.softmax(scores_nRS, dim=-1), v_nSc)
