"""Multi-token prediction modules (arXiv 2412.19437, section 2.2).

Module k (from 1) joins the previous depth's normalised hidden state with the embedding of
the token k places ahead, runs one layer, and predicts the token after that with the shared
head. The concatenation puts the embedding first, as the released weights do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualray.model.block import Block
from dualray.model.config import ModelConfig
from dualray.model.context import ForwardContext
from dualray.model.linear import Linear
from dualray.model.norm import RMSNorm


class SharedHead(nn.Module):
    """The depth's own norm in front of the head it shares with the main model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MtpModule(Block):
    """A `Block` plus the join in front of it and the norm behind it."""

    def __init__(self, config: ModelConfig, layer: int, expert_ids: tuple[int, ...]) -> None:
        super().__init__(config, layer, expert_ids)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = SharedHead(config)

    def predict(self, embedded_TD: Tensor, hidden_TD: Tensor, ctx: ForwardContext) -> Tensor:
        """Normalised hidden state of this depth (T, D), input of the head and the next depth."""
        joined = torch.cat((self.enorm(embedded_TD), self.hnorm(hidden_TD)), dim=-1)
        return self.shared_head.norm(self(self.eh_proj(joined, ctx.weight_grads), ctx))
