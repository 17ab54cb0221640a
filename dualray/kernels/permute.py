"""Moving token rows into expert order and back.

T tokens, K choices per token, N = T*K rows, D width. Both directions are gathers: a
scatter-add in either backward would be slower on CPU and non-deterministic on GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def sort_by_key(key_N: Tensor, num_keys: int, multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order by key: (order, inverse_N, rows int64 per key).

    A key gets its count of rows rounded up to `multiple`; `order` names the input at each
    row, -1 where the row is padding, and `inverse_N` the row of each input.
    """
    order = torch.argsort(key_N, stable=True)
    inverse = torch.empty_like(order)
    # Not bincount, whose result has a size that depends on the keys, which nothing can compile.
    counts = order.new_zeros(num_keys).scatter_add_(0, key_N, torch.ones_like(key_N))
    row = torch.arange(order.numel(), device=order.device)
    if multiple == 1:
        inverse.scatter_(0, order, row)
        return order, inverse, counts
    rows = (counts + multiple - 1) // multiple * multiple
    padding = rows - counts
    row += (padding.cumsum(0) - padding).index_select(0, key_N.index_select(0, order))
    inverse.scatter_(0, order, row)
    padded = order.new_full((int(rows.sum()),), -1).scatter_(0, row, order)
    return padded, inverse, rows


def _gather(x_ND: Tensor, index: Tensor, num_real: int) -> Tensor:
    """x[index], zero where the index is -1, which it is only if longer than `num_real`."""
    if index.numel() == num_real:
        return x_ND.index_select(0, index)
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(index.numel(), x_ND.shape[1])
    out = x_ND.index_select(0, index.clamp(min=0))
    return out.index_fill_(0, (index < 0).nonzero().squeeze(1), 0)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_real = min(order.numel(), inverse.numel())
        return _gather(x_ND, order, ctx.num_real)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return _gather(dy_ND, inverse, ctx.num_real), None, None


def _copies(x_TD: Tensor, inverse_N: Tensor) -> int:
    return max(inverse_N.numel() // max(x_TD.shape[0], 1), 1)


def _replicated(x_TD: Tensor, order: Tensor, inverse_N: Tensor) -> Tensor:
    token = order.div(_copies(x_TD, inverse_N), rounding_mode="floor")
    return _gather(x_TD, token, inverse_N.numel())


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.copies = _copies(x_TD, inverse_N)
        return _replicated(x_TD, order, inverse_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        if not inverse_N.numel():
            return dy_ND.new_zeros(0, dy_ND.shape[1]), None, None
        # One pass, where a gather and a sum would make all rows in between.
        dx_TD = F.embedding_bag(inverse_N.view(-1, ctx.copies), dy_ND, mode="sum")
        return dx_TD, None, None


def permute(x_ND: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[order]; differentiable. Each undoes the other; one of them may be padded with -1."""
    if not torch.is_grad_enabled():
        return _gather(x_ND, order, min(order.numel(), inverse.numel()))
    return _Permute.apply(x_ND, order, inverse)


def replicate(x_TD: Tensor, order: Tensor, inverse_N: Tensor) -> Tensor:
    """Row order[n] // K of x for each n, K = N / T: every token once per choice, sorted.

    Rows of padding (order -1) are zero.
    """
    if not torch.is_grad_enabled():
        return _replicated(x_TD, order, inverse_N)
    return _Replicate.apply(x_TD, order, inverse_N)
