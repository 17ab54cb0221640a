"""The model's RMSNorm layer, kept or made again in the backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualray.kernels.rms_norm import rms_norm
from dualray.model.context import ForwardContext
from dualray.model.recompute import Again


class RMSNorm(nn.Module):
    """Root mean square norm over the last dim; `weight` is (size,)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def normed(norm: RMSNorm, x: Tensor, ctx: ForwardContext) -> tuple[Tensor, Again | None]:
    """norm(x), and what makes it again where the context wants that."""
    out = norm(x)
    if ctx.recompute is None:
        return out, None
    kept = x.detach()
    return out, ctx.recompute.forget(lambda: (norm(kept),), out)
