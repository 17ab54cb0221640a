"""DeepSeekMoE: shared experts for every token, fine-grained routed experts by choice.

arXiv 2412.19437, section 2.1.2. T tokens, D model, F expert width, e local experts,
K choices, N = dispatched rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dualray.kernels.combine import combine
from dualray.kernels.grouped_gemm import equal_groups_pay, row_multiple
from dualray.kernels.permute import replicate, sort_by_key
from dualray.kernels.swiglu import swiglu
from dualray.model.config import ModelConfig
from dualray.model.context import Dispatched, Routing, WeightGradSink
from dualray.model.expert_ffn import expert_ffn
from dualray.model.linear import Linear
from dualray.model.router import Router


class FeedForward(nn.Module):
    """SwiGLU FFN of a dense layer, or all shared experts as one. Gate and up are one GEMM."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        halves = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = Linear(hidden_size, halves)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_TD: Tensor, sink: WeightGradSink | None) -> Tensor:
        return self.down_proj(swiglu(self.gate_up_proj(x_TD, sink)), sink)


class Experts(nn.Module):
    """The routed experts that this worker holds; slot s is logical expert `ids[s]`.

    The first `num_homes` slots own their experts, the others are redundant copies.
    """

    def __init__(self, config: ModelConfig, ids: tuple[int, ...]) -> None:
        super().__init__()
        self.ids = ids
        self.num_homes = len(ids)
        width, hidden = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(len(ids), 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(len(ids), hidden, width))

    def forward(
        self, rows_ND: Tensor, offsets_e: Tensor | int, sink: WeightGradSink | None
    ) -> Tensor:
        return expert_ffn(rows_ND, self.gate_up_proj, self.down_proj, offsets_e, sink)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig, layer: int, expert_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config, expert_ids)
        self.shared_experts = (
            FeedForward(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
            if config.n_shared_experts
            else None
        )


@dataclass(kw_only=True)
class _Sorted:
    order: Tensor
    inverse_N: Tensor
    gates_TK: Tensor


@dataclass(kw_only=True)
class _ToAll:
    gates_TE: Tensor


_FEW_TOKENS = 16
"""Up to here reading the experts' weights takes the time, and not the products with them."""


class LocalDispatch:
    """All experts are here: dispatch is a sort by expert, combine the way back.

    A few tokens that leave no expert out, as when a batch decodes, may go to all experts instead
    and count only where they were routed to: nothing is sorted, and every group has as many
    rows, so that one batched product does for all experts.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched:
        num_rows = routing.experts_TK.numel()
        if (
            not torch.is_grad_enabled()
            and routing.row_multiple is None
            and equal_groups_pay(x_TD)
            and 0 < len(x_TD) <= _FEW_TOKENS
            and num_rows >= self.num_experts
        ):
            return self._to_all(x_TD, routing)
        order, inverse, rows = sort_by_key(
            routing.experts_TK.flatten(),
            self.num_experts,
            routing.row_multiple or row_multiple(x_TD, num_rows // self.num_experts),
        )
        return Dispatched(
            rows_ND=replicate(x_TD, order, inverse),
            offsets=rows.cumsum(0).to(torch.int32),
            state=_Sorted(order=order, inverse_N=inverse, gates_TK=routing.gates_TK),
        )

    def _to_all(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        gates_TE = routing.gates_TK.new_zeros(len(x_TD), self.num_experts)
        gates_TE.scatter_(1, routing.experts_TK, routing.gates_TK)
        return Dispatched(
            rows_ND=x_TD.expand(self.num_experts, -1, -1).flatten(0, 1),
            offsets=len(x_TD),
            state=_ToAll(gates_TE=gates_TE),
        )

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        state: _Sorted | _ToAll = dispatched.state
        if isinstance(state, _ToAll):
            y_TED = y_ND.unflatten(0, (self.num_experts, -1)).transpose(0, 1)
            return torch.bmm(state.gates_TE.to(y_ND.dtype)[:, None], y_TED).squeeze(1)
        return combine(y_ND, state.gates_TK, state.order, state.inverse_N)
