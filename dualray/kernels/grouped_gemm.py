"""Grouped GEMM: every expert's matrix product in one call, no Python loop over experts.

`torch.nn.functional.grouped_mm` serves fp32 and bf16 on CPU and GPU. It has no float64
and wants every row to start at a multiple of 16 bytes; what it cannot take goes to the
looped reference, which computes the same sums.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dualray.kernels import reference

_ALIGNMENT_BYTES = 16
_FEW_ROWS = 64
_MULTIPLES = (16, 64)


def _supported(*widths: int, like: Tensor) -> bool:
    if like.element_size() not in (2, 4):
        return False
    return all(width * like.element_size() % _ALIGNMENT_BYTES == 0 for width in widths)


def row_multiple(like: Tensor, rows_per_group: int) -> int:
    """What the number of rows of every group should be a multiple of, to be fast.

    oneDNN compiles bf16 products anew for every row count that it has not seen, and keeps 1024 of
    them. Ragged groups never repeat, unless they are small: at 16384 rows over 16 experts the same
    product took 8 times as long. Padding to a 64th of a group's rows wastes 1 % of them, and groups
    between half and twice the mean have 96 row counts.
    """
    if rows_per_group < _FEW_ROWS or like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return 1
    least, most = _MULTIPLES
    return min(max(1 << (rows_per_group // 64).bit_length() - 1, least), most)


def equal_groups_pay(like: Tensor) -> bool:
    """Whether a batched product of equal groups beats ragged ones of a quarter of the rows.

    16 tokens, 16 experts, top 4, one core: 6.5 against 12.5 ms in bf16, where every small product
    costs oneDNN 30 us to start, and 10.6 against 7.9 ms in fp32. Ragged fp32 groups cannot be
    compiled.
    """
    if like.device.type != "cpu":
        return False
    return like.dtype == torch.bfloat16 or torch.compiler.is_compiling()


def grouped_mm(x_NK: Tensor, weight_eMK: Tensor, offsets_e: Tensor) -> Tensor:
    """x times the transpose of its group's weight: (N, K) x (e, M, K) -> (N, M).

    `offsets_e` int32 end rows, ascending; rows of one group are adjacent. Empty groups and
    N = 0 are fine.
    """
    weight_eKM = weight_eMK.transpose(1, 2)
    if torch.compiler.is_compiling() and x_NK.shape[0] <= weight_eMK.shape[0]:
        # Inductor makes one pass over the weights of gather, product and sum.
        row_N = torch.arange(x_NK.shape[0], device=x_NK.device, dtype=offsets_e.dtype)
        weight_NMK = weight_eMK[torch.searchsorted(offsets_e, row_N, right=True)]
        compute = torch.promote_types(x_NK.dtype, torch.float32)
        return (weight_NMK * x_NK[:, None]).sum(-1, dtype=compute).to(x_NK.dtype)
    if x_NK.shape[0] and _supported(*weight_eMK.shape[1:], like=x_NK):
        return F.grouped_mm(x_NK, weight_eKM, offs=offsets_e)
    return reference.grouped_mm(x_NK, weight_eKM, offsets_e)


def grouped_mm_input_grad(dy_NM: Tensor, weight_eMK: Tensor, offsets_e: Tensor) -> Tensor:
    """dy times its group's weight: (N, M) x (e, M, K) -> (N, K)."""
    if dy_NM.shape[0] and _supported(*weight_eMK.shape[1:], like=dy_NM):
        return F.grouped_mm(dy_NM, weight_eMK, offs=offsets_e)
    return reference.grouped_mm(dy_NM, weight_eMK, offsets_e)


def grouped_mm_weight_grad(dy_NM: Tensor, x_NK: Tensor, offsets_e: Tensor) -> Tensor:
    """Per group dy^T x: (N, M), (N, K) -> (e, M, K); empty groups give zeros."""
    if x_NK.shape[0] and _supported(dy_NM.shape[1], x_NK.shape[1], like=x_NK):
        return F.grouped_mm(dy_NM.t(), x_NK, offs=offsets_e)
    return reference.grouped_mm_weight_grad(dy_NM, x_NK, offsets_e)


def accumulate_weight_grad(sum_eMK: Tensor, dy_NM: Tensor, x_NK: Tensor, offsets_e: Tensor) -> None:
    """Add `grouped_mm_weight_grad` to `sum_eMK`, which may have a wider dtype.

    On a CPU group by group, so that a product is added while it is in cache.
    """
    if dy_NM.device.type != "cpu":
        sum_eMK.add_(grouped_mm_weight_grad(dy_NM, x_NK, offsets_e))
        return
    start = 0
    for sum_MK, end in zip(sum_eMK, offsets_e.tolist()):
        if start < end:
            add_weight_grad(sum_MK, dy_NM[start:end], x_NK[start:end])
        start = end


def add_weight_grad(sum_MK: Tensor, dy_NM: Tensor, x_NK: Tensor) -> None:
    """Add dy^T x of one group: on top of the sum if dtypes are the same, else rounded to dy's."""
    if sum_MK.dtype == dy_NM.dtype:
        sum_MK.addmm_(dy_NM.t(), x_NK)
    else:
        sum_MK.add_(dy_NM.t() @ x_NK)
