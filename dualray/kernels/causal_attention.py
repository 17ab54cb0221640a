"""Causal attention in strips of query rows, for CPUs.

A strip multiplies with the keys up to its own end only, so what lies above the diagonal
costs half a strip instead of half the square, and values may be narrower than keys. torch's
flash kernel on CPU wants equal widths, and its backward takes half as long again (fp32) or
twice as long (bf16) as these products do. The backward needs the probabilities again: they
are kept while they are small, and computed again where S^2 / 2 of them per head are not.

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
    return 256 if like.element_size() == 2 else 64


def _tiles(q_BGMSd: Tensor) -> Iterator[tuple[int, slice, int, int]]:
    """(sequence, key/value heads, first row, last row + 1) of every strip, few heads at a time."""
    B, G, M, S, _ = q_BGMSd.shape
    rows = _strip_rows(q_BGMSd)
    heads = max(1, _TILE_NUMEL // (M * rows * S))
    for b in range(B):
        for first in range(0, G, heads):
            for start in range(0, S, rows):
                yield b, slice(first, min(first + heads, G)), start, min(start + rows, S)


def _keeps_probabilities(S: int, d: int, v: int) -> bool:
    # S / 2 probabilities a row on average, against the row's query, key, value and output.
    return 4 * (d + v) >= S


def _probabilities(q_nMRd: Tensor, k_nSd: Tensor, scale: float, future_RR: Tensor) -> Tensor:
    """softmax of a strip's R rows over the first S keys: (n, M * R, S), in the dtype of k."""
    n, M, R, d = q_nMRd.shape
    q = (q_nMRd.to(k_nSd.dtype) * scale).reshape(n, M * R, d)
    logits = torch.bmm(q, k_nSd.transpose(1, 2))
    logits.view(n, M, R, -1)[..., -R:].add_(future_RR[:R, :R])
    return logits.softmax(-1)


class _StripAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHSd: Tensor, k_BGSd: Tensor, v_BGSv: Tensor, scale: float, keep: bool
    ) -> Tensor:
        q = q_BHSd.unflatten(1, (k_BGSd.shape[1], -1))
        k, v = k_BGSd, v_BGSv
        future, wide_k = _future(q), k.to(torch.promote_types(k.dtype, torch.float32))
        out = _empty_rows(q, v.shape[-1])
        kept = []
        for b, g, start, end in _tiles(q):
            p = _probabilities(q[b, g, :, start:end], wide_k[b, g, :end], scale, future)
            p = p.to(v.dtype)
            out[b, g, :, start:end] = torch.bmm(p, v[b, g, :end]).unflatten(1, (q.shape[2], -1))
            if keep:
                kept.append(p)
        ctx.save_for_backward(q_BHSd, k_BGSd, v_BGSv, *kept)
        ctx.scale = scale
        return out.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHSv: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHSd, k, v, *kept = ctx.saved_tensors
        q, dy = (x.unflatten(1, (k.shape[1], -1)) for x in (q_BHSd, dy_BHSv))
        compute = torch.promote_types(q.dtype, torch.float32)
        future, wide_k = _future(q), k if kept else k.to(compute)
        dq = _empty_rows(q, q.shape[-1])
        dk, dv = torch.zeros_like(k, dtype=compute), torch.zeros_like(v, dtype=compute)
        for number, (b, g, start, end) in enumerate(_tiles(q)):
            q_rows, dy_rows = (x[b, g, :, start:end].flatten(1, 2) for x in (q, dy))
            if kept:
                p = kept[number]
            else:
                strip = q[b, g, :, start:end]
                p = _probabilities(strip, wide_k[b, g, :end], ctx.scale, future).to(v.dtype)
            _add_bmm(dv[b, g, :end], p.transpose(1, 2), dy_rows, 1.0)
            dp = torch.bmm(dy_rows, v[b, g, :end].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq_rows = torch.bmm(ds, k[b, g, :end]).mul_(ctx.scale)
            dq[b, g, :, start:end] = dq_rows.unflatten(1, (q.shape[2], -1))
            _add_bmm(dk[b, g, :end], ds.transpose(1, 2), q_rows, ctx.scale)
        return dq.flatten(1, 2), dk.to(k.dtype), dv.to(v.dtype), None, None


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
