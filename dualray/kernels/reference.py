"""Slow twins: the same operations written as plainly as possible, for any dtype.

N rows, e groups (local experts), K inner width, M outer width.
"""

from __future__ import annotations

from torch import Tensor


def grouped_mm(a_NK: Tensor, b_eKM: Tensor, offsets_e: Tensor) -> Tensor:
    """Rows of group g times b[g]; `offsets_e` are the groups' end rows. Returns (N, M)."""
    out = a_NK.new_zeros(a_NK.shape[0], b_eKM.shape[2])
    start = 0
    for group, end in enumerate(offsets_e.tolist()):
        out[start:end] = a_NK[start:end] @ b_eKM[group]
        start = end
    return out


def grouped_mm_weight_grad(dy_NM: Tensor, x_NK: Tensor, offsets_e: Tensor) -> Tensor:
    """Per group the product dy^T x of its rows. Returns (e, M, K)."""
    out = x_NK.new_zeros(offsets_e.numel(), dy_NM.shape[1], x_NK.shape[1])
    start = 0
    for group, end in enumerate(offsets_e.tolist()):
        out[group] = dy_NM[start:end].t() @ x_NK[start:end]
        start = end
    return out
