"""RMSNorm with a backward of its own: plain autograd is a chain of a dozen passes.

Saves its input and 1 / rms, which is computed in fp32 (float64 for float64). As in Hugging
Face's models the normalised values are rounded to the input's dtype before the weight
multiplies them. T rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim of (..., D)."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight_D, eps)
    # Decoding is made of small operations: apply alone costs a third of one.
    return _normalise(x, weight_D, eps)[0]


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The slow twin."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide.to(x.dtype)


def _normalise(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The output, and 1 / rms as (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight_D), inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out, inverse = _normalise(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse = ctx.saved_tensors
        compute = inverse.dtype
        normed = x.to(compute) * inverse
        dy = dy.to(compute)
        product = dy * normed
        dw = product.flatten(0, -2).sum(0)
        # Mean over D of what flows into the normalised values, times themselves.
        mean = torch.mv(product.flatten(0, -2), weight_D.to(compute)).div_(-x.shape[-1])
        dx = torch.mul(dy, weight_D, out=product)
        dx.addcmul_(normed, mean.view(inverse.shape)).mul_(inverse)
        return dx.to(x.dtype), dw.to(weight_D.dtype), None
