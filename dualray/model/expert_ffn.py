"""The routed experts' FFN as one layer, with weight gradients that can be deferred.

Where a walk over experts pays it is one autograd function; else, and without a sink, it is
grouped products with SwiGLU between them, the slow twin.
N rows, e experts, D model, F expert width, G = 2F for gate and up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.kernels.expert_walk import (
    add_experts_weight_grad,
    experts,
    experts_grad,
    groups,
    walk_pays,
)
from dualray.kernels.swiglu import swiglu
from dualray.model.context import WeightGradSink
from dualray.model.linear import grouped_linear


def expert_ffn(
    rows_ND: Tensor,
    gate_up_eGD: Tensor,
    down_eDF: Tensor,
    offsets: Tensor | int,
    sink: WeightGradSink | None,
) -> Tensor:
    """SwiGLU FFN of every row's expert, (N, D). Rows of one expert are adjacent.

    `offsets` are the experts' end rows, or how many rows each has (without gradients only).
    """
    if isinstance(offsets, Tensor) and walk_pays(rows_ND, len(gate_up_eGD)):
        if not torch.is_grad_enabled():
            return experts(rows_ND, gate_up_eGD, down_eDF, offsets.tolist(), keep=False)[0]
        if sink is not None:
            return _ExpertFfn.apply(rows_ND, gate_up_eGD, down_eDF, offsets, sink)
    return expert_ffn_reference(rows_ND, gate_up_eGD, down_eDF, offsets, sink)


def expert_ffn_reference(
    rows_ND: Tensor,
    gate_up_eGD: Tensor,
    down_eDF: Tensor,
    offsets: Tensor | int,
    sink: WeightGradSink | None,
) -> Tensor:
    """The slow twin on a CPU with many rows, and the only way elsewhere."""
    hidden_NF = swiglu(grouped_linear(rows_ND, gate_up_eGD, offsets, sink))
    return grouped_linear(hidden_NF, down_eDF, offsets, sink)


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor, sink: WeightGradSink
    ) -> Tensor:
        ctx.ends = offsets.tolist()
        out, kept, silus = experts(rows, gate_up, down, ctx.ends, keep=True)
        # The backward writes over these. A second one notices by their versions, and raises.
        ctx.save_for_backward(rows, *kept, *silus)
        ctx.gate_up, ctx.down, ctx.sink = gate_up, down, sink
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows, *saved = ctx.saved_tensors
        ends, dy = ctx.ends, dy.contiguous()
        kept, hidden = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        dx = experts_grad(dy, kept, hidden, ctx.gate_up, ctx.down, ends)
        dy_e, rows_e = ([side[part] for _, part in groups(ends)] for side in (dy, rows))
        ctx.sink.submit(ctx.down, lambda grad: add_experts_weight_grad(grad, dy_e, hidden, ends))
        ctx.sink.submit(ctx.gate_up, lambda grad: add_experts_weight_grad(grad, kept, rows_e, ends))
        return dx, None, None, None, None
