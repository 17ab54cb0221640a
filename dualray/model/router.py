"""The router: sigmoid scores, group-limited top-k, bias that chooses but does not weigh.

arXiv 2412.19437, section 2.1.2. T tokens, E experts, K choices, G groups, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext, Routing
from dualray.model.linear import linear


class Router(nn.Module):
    """Chooses experts per token. Scores are computed in fp32 (float64 for float64 models)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Routing:
        compute = torch.promote_types(x_TD.dtype, torch.float32)
        logits = linear(x_TD.to(compute), self.weight.to(compute), None)
        scores_TE = logits.sigmoid()
        experts_TK = self._choose(scores_TE.detach(), ctx)
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            gates_TK = gates_TK / (gates_TK.sum(dim=-1, keepdim=True) + 1e-20)
        routing = Routing(
            experts_TK=experts_TK,
            gates_TK=gates_TK * self.config.routed_scaling_factor,
            scores_TE=scores_TE,
        )
        self._record(routing, ctx)
        return routing

    def _choose(self, scores_TE: Tensor, ctx: ForwardContext) -> Tensor:
        if ctx.tape is not None and ctx.tape.replay:
            return ctx.tape.choices[self.layer]
        biased = scores_TE + self.e_score_correction_bias
        experts_TK = choose_experts(biased, self.config)
        if ctx.tape is not None:
            ctx.tape.choices[self.layer] = experts_TK
        return experts_TK

    def _record(self, routing: Routing, ctx: ForwardContext) -> None:
        if ctx.loads is not None:
            counts = torch.bincount(
                routing.experts_TK.flatten(), minlength=self.config.n_routed_experts
            )
            ctx.loads[self.layer] = ctx.loads.get(self.layer, 0) + counts
        if ctx.balance_scale:
            loss = sequence_balance_loss(routing, ctx.seq_lens)
            ctx.balance_losses.append(loss * ctx.balance_scale)
        if ctx.aux_scale:
            ctx.balance_losses.append(auxiliary_loss(routing) * ctx.aux_scale)


def choose_experts(biased_TE: Tensor, config: ModelConfig) -> Tensor:
    """(T, K) int64: the top experts within the top groups; a group scores its best two."""
    if config.n_group > 1:
        grouped_TGe = biased_TE.unflatten(1, (config.n_group, -1))
        group_scores_TG = grouped_TGe.topk(2, dim=-1).values.sum(-1)
        chosen = group_scores_TG.topk(config.topk_group, dim=-1, sorted=False).indices
        closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, chosen, False)
        biased_TE = grouped_TGe.masked_fill(closed_TG[..., None], float("-inf")).flatten(1)
    return biased_TE.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices


def auxiliary_loss(routing: Routing) -> Tensor:
    """sum_i f_i P_i over all T tokens, unweighted (arXiv 2101.03961, equations 4 to 6).

    There scores are a softmax and K is 1; here P_i is of sigmoid scores normalised over the
    experts, and f_i is scaled so that balance gives 1, as in the sequence-wise loss: the two
    are one where the tokens are one sequence.
    """
    return sequence_balance_loss(routing, (routing.scores_TE.shape[0],))


def sequence_balance_loss(routing: Routing, seq_lens: tuple[int, ...]) -> Tensor:
    """Sum over sequences of sum_i f_i P_i, unweighted (equations 17 to 20).

    f_i is the share of choices that fell on expert i, scaled so that balance gives 1; P_i
    the mean over the sequence of the scores normalised over experts.
    """
    scores_TE, experts_TK = routing.scores_TE, routing.experts_TK
    T, E = scores_TE.shape
    K = experts_TK.shape[1]
    lengths_B = torch.tensor(seq_lens, device=scores_TE.device)
    sequence_T = torch.repeat_interleave(
        torch.arange(len(seq_lens), device=scores_TE.device), lengths_B, output_size=T
    )
    cells = (sequence_T[:, None] * E + experts_TK).flatten()
    counts_BE = torch.bincount(cells, minlength=len(seq_lens) * E).view(-1, E)
    f_BE = counts_BE.to(scores_TE.dtype) * (E / K) / lengths_B[:, None]
    normalised_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
    sums_BE = scores_TE.new_zeros(len(seq_lens), E).index_add(0, sequence_T, normalised_TE)
    return (f_BE * sums_BE / lengths_B[:, None]).sum()
