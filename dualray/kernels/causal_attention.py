"""Causal attention in strips of query rows, for CPUs.

A strip multiplies with the keys up to its own end only, so what lies above the diagonal
costs half a strip instead of half the square, and values may be narrower than keys. torch's
flash kernel on CPU wants equal widths, and its backward takes 1.7 times as long as these
products do (73 against 42 ms in fp32, 52 against 30 ms in bf16: 8 x 4 heads x 512, widths 96
and 64, one Zen 4 core). The backward needs the probabilities again: they are kept while they
are small, and computed again where S^2 / 2 of them per head are not.

B sequences, H query heads, G key/value heads, M = H / G query heads per key/value head,
S rows, R rows of a strip, d key width, v value width, n key/value heads at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_STRIPS_LEN = 96
"""Sequences of fewer rows are one or two strips, and torch's kernel has less to start."""

_TILE_NUMEL = 2**19
"""Logits in flight: 2 MiB of fp32, which a core's cache nearly holds."""


def causal_attention(q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v under the causal mask: (B, H, S, v).

    Query head h attends to key/value head h // (H / G). Logits and softmax are in fp32
    (float64 for float64) whatever the dtype of the inputs.
    """
    if q_BHSd.device.type == "cpu" and q_BHSd.shape[2] >= _MIN_STRIPS_LEN:
        S, d = q_BHSd.shape[2:]
        keep = torch.is_grad_enabled() and _keeps_probabilities(S, d, v_BGSv.shape[-1])
        return _StripAttention.apply(q_BHSd, k_BGSd, v_BGSv, scale, keep)
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


def _strip_rows(like: Tensor) -> int:
    # Narrow strips waste less above the diagonal; bf16 products need more rows to be fast.
    return 256 if like.element_size() == 2 else 128


def _heads(q_BGMSd: Tensor) -> Iterator[tuple[int, slice]]:
    """(sequence, some key/value heads): what goes through one strip after the other."""
    B, G, M, S, _ = q_BGMSd.shape
    count = max(1, _TILE_NUMEL // (M * _strip_rows(q_BGMSd) * S))
    for b in range(B):
        for first in range(0, G, count):
            yield b, slice(first, min(first + count, G))


def _strips(q_BGMSd: Tensor) -> list[tuple[int, int]]:
    S, rows = q_BGMSd.shape[3], _strip_rows(q_BGMSd)
    return [(start, min(start + rows, S)) for start in range(0, S, rows)]


def _keeps_probabilities(S: int, d: int, v: int) -> bool:
    # S / 2 probabilities a row on average, against the row's query, key, value and output.
    return 4 * (d + v) >= S


def _probabilities(q_nMRd: Tensor, k_nSd: Tensor, future_RR: Tensor) -> Tensor:
    """softmax of a strip's R rows of scaled queries over the first S keys: (n, M * R, S)."""
    n, M, R, _ = q_nMRd.shape
    logits = torch.bmm(q_nMRd.flatten(1, 2), k_nSd.transpose(1, 2))
    logits.view(n, M, R, -1)[..., -R:].add_(future_RR[:R, :R])
    return logits.softmax(-1)


class _StripAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float, keep: bool
    ) -> Tensor:
        q_BGMSd = q_BHSd.unflatten(1, (k_BGSd.shape[1], -1))
        strips, future = _strips(q_BGMSd), _future(q_BGMSd)
        out_BGMSv = _empty_rows(q_BGMSd, v_BGSv.shape[-1])
        kept = []
        for b, g in _heads(q_BGMSd):
            q = q_BGMSd[b, g].to(future.dtype) * scale
            k, v, out = k_BGSd[b, g].to(future.dtype), v_BGSv[b, g], out_BGMSv[b, g]
            for start, end in strips:
                p = _probabilities(q[:, :, start:end], k[:, :end], future).to(v.dtype)
                out[:, :, start:end] = torch.bmm(p, v[:, :end]).view(*q.shape[:2], end - start, -1)
                if keep:
                    kept.append(p)
        ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSv, *kept)
        ctx.scale = scale
        return out_BGMSv.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHSv: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHSd, k_BGSd, v_BGSv, *kept = ctx.saved_tensors
        q_BGMSd, dy_BGMSv = (x.unflatten(1, (k_BGSd.shape[1], -1)) for x in (q_BHSd, dy_BHSv))
        strips, future = _strips(q_BGMSd), _future(q_BGMSd)
        dq_BGMSd = _empty_rows(q_BGMSd, q_BGMSd.shape[-1])
        dk_BGSd = torch.zeros_like(k_BGSd, dtype=future.dtype)
        dv_BGSv = torch.zeros_like(v_BGSv, dtype=future.dtype)
        remaining = iter(kept)
        for b, g in _heads(q_BGMSd):
            q, dy = q_BGMSd[b, g].contiguous(), dy_BGMSv[b, g].contiguous()
            k, v = k_BGSd[b, g], v_BGSv[b, g]
            dq, dk, dv = dq_BGMSd[b, g], dk_BGSd[b, g], dv_BGSv[b, g]
            wide_q = q if kept else q.to(future.dtype) * ctx.scale
            wide_k = k if kept else k.to(future.dtype)
            for start, end in strips:
                if kept:
                    p = next(remaining)
                else:
                    p = _probabilities(wide_q[:, :, start:end], wide_k[:, :end], future)
                    p = p.to(v.dtype)
                q_rows, dy_rows = (
                    q[:, :, start:end].flatten(1, 2),
                    dy[:, :, start:end].flatten(1, 2),
                )
                _add_bmm(dv[:, :end], p.transpose(1, 2), dy_rows, 1.0)
                dp = torch.bmm(dy_rows, v[:, :end].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                dq_rows = torch.bmm(ds, k[:, :end]).view(*q.shape[:2], end - start, -1)
                torch.mul(dq_rows, ctx.scale, out=dq[:, :, start:end])
                _add_bmm(dk[:, :end], ds.transpose(1, 2), q_rows, ctx.scale)
        return (
            dq_BGMSd.flatten(1, 2),
            dk_BGSd.to(k_BGSd.dtype),
            dv_BGSv.to(v_BGSv.dtype),
            None,
            None,
        )


def _empty_rows(like_BGMSd: Tensor, width: int) -> Tensor:
    """(B, G, M, S, width) laid out with S before the heads, as projections are."""
    B, G, M, S, _ = like_BGMSd.shape
    return like_BGMSd.new_empty(B, S, G, M, width).permute(0, 2, 3, 1, 4)


def _future(q_BGMSd: Tensor) -> Tensor:
    """-inf above the diagonal of a strip's last R keys."""
    rows = _strip_rows(q_BGMSd)
    compute = torch.promote_types(q_BGMSd.dtype, torch.float32)
    return torch.full((rows, rows), float("-inf"), dtype=compute).triu_(1)


def _add_bmm(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale * (a @ b); a total of more precision rounds each product only."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=scale)
    else:
        total.add_(torch.bmm(a, b), alpha=scale)
