"""SwiGLU that keeps its input alone, and writes both halves of its gradient into one tensor.

Plain autograd keeps silu(gate) as well and concatenates two halves in its backward. On a CPU
the backward goes by blocks whose temporaries stay in cache.
N rows, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.kernels.blocks import blocks


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of each row: (N, 2F) -> (N, F)."""
    return _SwiGlu.apply(gate_up) if torch.is_grad_enabled() else swiglu_reference(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The slow twin."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_into(gate_up: Tensor, silu: Tensor, out: Tensor) -> None:
    """silu(first half) and `swiglu`, (N, F) both, written to `silu` and `out`; may be the same."""
    for rows in blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=silu[rows])
        torch.mul(silu[rows], up, out=out[rows])


def swiglu_grad_(gate_up: Tensor, silu: Tensor, dy: Tensor) -> None:
    """`gate_up` becomes its gradient, `silu` becomes `swiglu` once more, and `dy` is spoilt."""
    spare = None
    for rows in blocks(gate_up):
        gate, up = gate_up[rows].chunk(2, dim=-1)
        if spare is None:
            spare = torch.empty_like(dy[rows])
        d_silu, d_up = spare[: len(gate)], dy[rows]
        torch.mul(d_up, up, out=d_silu)
        d_up.mul_(silu[rows])
        silu[rows].mul_(up)
        up.copy_(d_up)
        torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=gate)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        for rows in blocks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            d_gate, d_up = grad[rows].chunk(2, dim=-1)
            torch.mul(F.silu(gate), dy[rows], out=d_up)
            torch.ops.aten.silu_backward.grad_input(dy[rows] * up, gate, grad_input=d_gate)
        return grad
