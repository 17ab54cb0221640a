"""The routed experts' outputs back in token order, weighted by their gates and summed.

The backward makes the gradients of the sorted rows and of the gates in one walk over blocks
that stay in a core's cache. Plain autograd makes T*K rows in token order first, and sorts
them afterwards: 18 against 4 ms at 4096 tokens, 4 choices, 256 wide, fp32, on one core.

T tokens, K choices, N = T*K choices, M >= N sorted rows (some may be padding), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.kernels.blocks import blocks
from dualray.kernels.permute import permute


def combine(y_MD: Tensor, gates_TK: Tensor, order_M: Tensor, inverse_N: Tensor) -> Tensor:
    """Gate-weighted sum of each token's rows: (T, D) in the dtype of y.

    `order_M` and `inverse_N` are those of `sort_by_key` over the flattened choices.
    """
    if torch.is_grad_enabled():
        return _Combine.apply(y_MD, gates_TK, order_M, inverse_N)
    return combine_reference(y_MD, gates_TK, order_M, inverse_N)


def combine_reference(y_MD: Tensor, gates_TK: Tensor, order_M: Tensor, inverse_N: Tensor) -> Tensor:
    """The slow twin: sorted rows go to (token, choice) order, and are summed there."""
    rows_TKD = permute(y_MD, inverse_N, order_M).unflatten(0, gates_TK.shape)
    return torch.bmm(gates_TK.to(y_MD.dtype)[:, None], rows_TKD).squeeze(1)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_MD: Tensor, gates_TK: Tensor, order_M: Tensor, inverse_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_MD, gates_TK, order_M, inverse_N)
        T, K = gates_TK.shape
        out_TD = y_MD.new_empty(T, y_MD.shape[1])
        gates, inverse_TK = gates_TK.to(y_MD.dtype)[:, None], inverse_N.view(T, K)
        for tokens in blocks(out_TD, K):
            rows = y_MD.index_select(0, inverse_TK[tokens].flatten()).unflatten(0, (-1, K))
            torch.bmm(gates[tokens], rows, out=out_TD[tokens, None])
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_MD, gates_TK, order_M, inverse_N = ctx.saved_tensors
        M = len(y_MD)
        d_rows_MD, d_gate_M = torch.empty_like(y_MD), gates_TK.new_empty(M)
        choice_M = order_M.clamp(min=0)
        gate_M = gates_TK.flatten()[choice_M]
        if inverse_N.numel() < M:
            gate_M = gate_M.masked_fill(order_M < 0, 0)
        gate_M = gate_M.to(y_MD.dtype)
        token_M = choice_M.div(gates_TK.shape[1], rounding_mode="floor")
        for rows in blocks(y_MD):
            d_rows = torch.index_select(dy_TD, 0, token_M[rows], out=d_rows_MD[rows])
            d_gate_M[rows] = (d_rows.to(d_gate_M.dtype) * y_MD[rows]).sum(-1)
            d_rows.mul_(gate_M[rows, None])
        return d_rows_MD, d_gate_M[inverse_N].view_as(gates_TK), None, None
