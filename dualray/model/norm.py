"""The model's RMSNorm layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualray.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Root mean square norm over the last dim; `weight` is (size,)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
