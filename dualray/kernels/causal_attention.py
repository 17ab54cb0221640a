"""Causal attention in strips of query rows, for CPUs.

A strip multiplies with the keys up to its own end only, so what lies above the diagonal
costs half a strip instead of half the square, and values may be narrower than keys. torch's
flash kernel on CPU wants equal widths and its backward takes twice the time of these matrix
products (78 against 50 ms in fp32; 8 x 4 heads x 512, one core).
The backward computes the probabilities again instead of keeping S^2 / 2 of them per head.

B sequences, H query heads, G key/value heads, M = H / G query heads per key/value head,
S rows, R rows of a strip, d key width, v value width. N = B * G products in one call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_STRIPS_LEN = 96
"""Sequences of fewer rows are one or two strips, and torch's kernel has less to start."""


def causal_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v under the causal mask: (B, H, S, v).

    Query head h attends to key/value head h // (H / G). Logits and softmax are in fp32
    (float64 for float64) whatever the dtype of the inputs.
    """
    if q_BHSd.device.type == "cpu" and q_BHSd.shape[2] >= _MIN_STRIPS_LEN:
        return _StripAttention.apply(q_BHSd, k_BGSd, v_BGSv, scale)
    return torch_attention(q_BHSd, k_BGSd, v_BGSv, scale)


def torch_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float) -> Tensor:
    """The same by torch's own kernel: for other devices and short sequences, and the twin."""
    # Equal head widths let torch take its flash kernel instead of the plain one.
    width = v_BGSv.shape[-1]
    if width < q_BHSd.shape[-1]:
        v_BGSv = F.pad(v_BGSv, (0, q_BHSd.shape[-1] - width))
    grouped = q_BHSd.shape[1] != k_BGSd.shape[1]
    out = F.scaled_dot_product_attention(
        q_BHSd, k_BGSd, v_BGSv, is_causal=True, scale=scale, enable_gqa=grouped
    )
    return out[..., :width]


def _strips(size: int, like: Tensor) -> list[tuple[int, int]]:
    # Narrow strips waste less above the diagonal; bf16 products need more rows to be fast.
    rows = 128 if like.element_size() == 2 else 64
    return [(start, min(start + rows, size)) for start in range(0, size, rows)]


def _probabilities(q_NMRd: Tensor, k_NSd: Tensor, start: int, scale: float) -> Tensor:
    """softmax of the strip that begins at row `start`: (N, M * R, end) in fp32 or float64."""
    N, M, R, _ = q_NMRd.shape
    compute = torch.promote_types(q_NMRd.dtype, torch.float32)
    q = (q_NMRd.to(compute) * scale).view(N, M * R, -1)
    logits = torch.bmm(q, k_NSd[:, : start + R].transpose(1, 2))
    future = torch.full((R, R), float("-inf"), dtype=compute).triu_(1)
    logits.view(N, M, R, -1)[..., start:].add_(future)
    return logits.softmax(-1)


class _StripAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSv)
        ctx.scale = scale
        q, k, v = _by_key_head(q_BHSd, k_BGSd, v_BGSv)
        N, M, S, _ = q.shape
        k = k.to(torch.promote_types(k.dtype, torch.float32))
        out = v.new_empty(N, M, S, v.shape[-1])
        for start, end in _strips(S, q):
            p = _probabilities(q[:, :, start:end], k, start, scale).to(v.dtype)
            out[:, :, start:end] = torch.bmm(p, v[:, :end]).view(N, M, end - start, -1)
        return out.view(*q_BHSd.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHSv: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHSd, k_BGSd, v_BGSv = ctx.saved_tensors
        q, k, v = _by_key_head(q_BHSd, k_BGSd, v_BGSv)
        N, M, S, _ = q.shape
        dy = dy_BHSv.contiguous().view(N, M, S, -1)
        compute = torch.promote_types(q.dtype, torch.float32)
        k_compute = k.to(compute)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=compute), torch.zeros_like(v, dtype=compute)
        for start, end in _strips(S, q):
            rows = slice(start, end)
            p = _probabilities(q[:, :, rows], k_compute, start, ctx.scale).to(v.dtype)
            dy_strip = dy[:, :, rows].reshape(N, -1, dy.shape[-1])
            q_strip = q[:, :, rows].reshape(N, -1, q.shape[-1])
            _add_bmm(dv[:, :end], p.transpose(1, 2), dy_strip, 1.0)
            dp = torch.bmm(dy_strip, v[:, :end].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, rows] = torch.bmm(ds, k[:, :end]).mul_(ctx.scale).view(N, M, end - start, -1)
            _add_bmm(dk[:, :end], ds.transpose(1, 2), q_strip, ctx.scale)
        return (
            dq.view_as(q_BHSd),
            dk.to(k.dtype).view_as(k_BGSd),
            dv.to(v.dtype).view_as(v_BGSv),
            None,
        )


def _by_key_head(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, M, S, d), (N, S, d), (N, S, v); copies what is not laid out so."""
    B, H, S, d = q_BHSd.shape
    N = B * k_BGSd.shape[1]
    return (
        q_BHSd.contiguous().view(N, B * H // N, S, d),
        k_BGSd.contiguous().view(N, S, d),
        v_BGSv.contiguous().view(N, S, -1),
    )


def _add_bmm(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale * (a @ b); a total of more precision rounds each product only."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)
