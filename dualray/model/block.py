"""One transformer layer in four phases: attend -> dispatch -> experts -> combine.

Dispatch and combine communicate; attend and experts compute. `forward` runs them in turn, and
where it waits for a message another micro-batch may go on.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from dualray.model.attention import make_attention
from dualray.model.config import ModelConfig
from dualray.model.context import Dispatched, ForwardContext, Routing
from dualray.model.moe import FeedForward, MoE
from dualray.model.norm import RMSNorm, normed


@dataclass(kw_only=True)
class Attended:
    """After attention: the residual stream, the FFN's normalised input, the chosen experts."""

    residual_TD: Tensor
    normed_TD: Tensor
    routing: Routing | None


class Block(nn.Module):
    """RMSNorm, attention, RMSNorm, then a dense FFN or a MoE. `expert_ids` are the slots held."""

    def __init__(self, config: ModelConfig, layer: int, expert_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = make_attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MoE | FeedForward = (
            MoE(config, layer, expert_ids)
            if config.is_moe(layer)
            else FeedForward(config.hidden_size, config.intermediate_size)
        )

    def attend(self, x_TD: Tensor, ctx: ForwardContext) -> Attended:
        normed_TD, _ = normed(self.input_layernorm, x_TD, ctx)
        residual_TD = x_TD + self.self_attn(normed_TD, ctx)
        normed_TD, _ = normed(self.post_attention_layernorm, residual_TD, ctx)
        routing = self.mlp.gate(normed_TD, ctx) if isinstance(self.mlp, MoE) else None
        return Attended(residual_TD=residual_TD, normed_TD=normed_TD, routing=routing)

    def dispatch(self, attended: Attended, ctx: ForwardContext) -> Dispatched | None:
        if attended.routing is None:
            return None
        return ctx.dispatch.dispatch(self.layer, attended.normed_TD, attended.routing)

    def experts(
        self, attended: Attended, dispatched: Dispatched | None, ctx: ForwardContext
    ) -> tuple[Tensor | None, Tensor | None]:
        """(routed rows still on their worker, output of the dense or shared FFN)."""
        if not isinstance(self.mlp, MoE):
            return None, self.mlp(attended.normed_TD, ctx.weight_grads)
        assert dispatched is not None
        rows = self.mlp.experts(dispatched.rows_ND, dispatched.offsets, ctx.weight_grads)
        if self.mlp.shared_experts is None:
            return rows, None
        return rows, self.mlp.shared_experts(attended.normed_TD, ctx.weight_grads)

    def combine(
        self,
        attended: Attended,
        dispatched: Dispatched | None,
        outputs: tuple[Tensor | None, Tensor | None],
        ctx: ForwardContext,
    ) -> Tensor:
        rows, local = outputs
        out = attended.residual_TD
        if local is not None:
            out = out + local
        if rows is not None and dispatched is not None:
            out = out + ctx.dispatch.combine(rows, dispatched)
        return out

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        with nullcontext() if ctx.recompute is None else ctx.recompute.scope():
            return self._phases(x_TD, ctx)

    def _phases(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        attended = self.attend(x_TD, ctx)
        dispatched = self.dispatch(attended, ctx)
        return self.combine(attended, dispatched, self.experts(attended, dispatched, ctx), ctx)
