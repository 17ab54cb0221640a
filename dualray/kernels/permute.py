"""Moving token rows into expert order and back.

T tokens, K choices per token, N = T*K rows, D width. Both directions are gathers: a
scatter-add in either backward would be slower on CPU and non-deterministic on GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sort_by_key(key_N: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable order by key: (order_N, inverse_N, counts int64 per key)."""
    order = torch.argsort(key_N, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return order, inverse, torch.bincount(key_N, minlength=num_keys)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND.index_select(0, order_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return dy_ND.index_select(0, inverse_N), None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.copies = order_N.numel() // max(x_TD.shape[0], 1)
        return x_TD.index_select(0, order_N // max(ctx.copies, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        rows = dy_ND.index_select(0, inverse_N)
        return rows.view(-1, max(ctx.copies, 1), dy_ND.shape[1]).sum(1), None, None


def permute(x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """x[order]; differentiable. `inverse_N` is the inverse permutation."""
    return _Permute.apply(x_ND, order_N, inverse_N)


def replicate(x_TD: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
    """Row order[n] // K of x for each n, K = N / T: every token once per choice, sorted."""
    return _Replicate.apply(x_TD, order_N, inverse_N)
