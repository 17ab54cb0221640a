"""Decoupled rotary embedding with YaRN (arXiv 2104.09864, 2309.00071).

The half-split layout is used: the first half of the rotary dims pairs with the second.
T tokens, R rotary width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.model.config import ModelConfig, YarnConfig


def _mscale(coefficient: float, factor: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * coefficient * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """(nope + rope)^-0.5, sharpened under YaRN when mscale_all_dim is set."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= _mscale(yarn.mscale_all_dim, yarn.factor) ** 2
    return scale


def _yarn_frequencies(wavelengths: Tensor, theta: float, dim: int, yarn: YarnConfig) -> Tensor:
    """Interpolate slow frequencies, keep fast ones, ramp between (YaRN, section 3.2).

    In the order of the released code, whose very bits come out.
    """

    def correction_dim(rotations: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), dim - 1)
    span = (high - low) or 0.001  # negative where even the fastest frequency turns too seldom
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return 1.0 / (yarn.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class Rope:
    """Rotary frequencies of a config; holds no parameters and no device."""

    def __init__(self, config: ModelConfig) -> None:
        dim = config.qk_rope_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        wavelengths = config.rope_theta**exponents
        freqs = 1.0 / wavelengths
        yarn = config.rope_scaling
        self.factor = 1.0
        if yarn is not None:
            freqs = _yarn_frequencies(wavelengths, config.rope_theta, dim, yarn)
            self.factor = _mscale(yarn.mscale, yarn.factor) / _mscale(
                yarn.mscale_all_dim, yarn.factor
            )
        self.freqs = freqs

    def cos_sin(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R/2) of every position's angles, computed in fp32 at least."""
        compute = torch.promote_types(dtype, torch.float32)
        angles = positions_T[:, None].to(compute) * self.freqs.to(positions_T.device, compute)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


class _RotateTail(torch.autograd.Function):
    """One copy instead of a split, two halves and a concatenation, and the same backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    half = cos.shape[-1]
    first, second = x[..., -2 * half : -half], x[..., -half:]
    tail = out[..., -2 * half :]
    # Both halves in one pass: on a CPU these runs of few values cost more to start than to do.
    tail.mul_(torch.cat((cos, cos), dim=-1))
    tail[..., :half].addcmul_(second, sin, value=-1)
    tail[..., half:].addcmul_(first, sin)
    return out


def rotate_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last R channels of (T, d) or (T, H, d) by the angles (T, R/2) of `cos_sin`."""
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    return _RotateTail.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)
