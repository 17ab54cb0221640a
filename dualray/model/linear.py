"""Layers whose weight gradient can be deferred.

A backward splits into I (gradient of the input, which the previous stage waits for) and W
(gradient of the weights, which nobody waits for until the optimizer). With a
`WeightGradSink` these functions compute I in autograd's backward and hand W over as a
closure that accumulates into `weight.main_grad`; autograd itself never sees a weight
gradient. Without a sink they are plain torch operations: the slow twin.

In bfloat16 the product of one micro-batch is rounded to bfloat16 (relative error 1.7e-3)
before it is added to the fp32 main gradient; the sum over micro-batches is not rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualray.kernels import grouped_gemm
from dualray.model.context import WeightGradSink


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: WeightGradSink
    ) -> Tensor:
        ctx.save_for_backward(x)
        # Not saved: what comes back from there may be another object, without its main_grad.
        ctx.weight, ctx.bias, ctx.sink = weight, bias, sink
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight

        def accumulate(main_grad: Tensor) -> None:
            if main_grad.dtype == dy.dtype:
                main_grad.addmm_(dy.t(), x)
            else:
                main_grad.add_(dy.t() @ x)

        ctx.sink.submit(weight, accumulate)
        if ctx.bias is not None:
            ctx.sink.submit(ctx.bias, lambda grad: grad.add_(dy.sum(0, dtype=grad.dtype)))
        return dy @ weight, None, None, None


class _SplitGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, sink: WeightGradSink
    ) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.weight, ctx.sink = weight, sink
        return grouped_gemm.grouped_mm(x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x, offsets), weight = ctx.saved_tensors, ctx.weight
        dy = dy.contiguous()

        def accumulate(main_grad: Tensor) -> None:
            grouped_gemm.accumulate_weight_grad(main_grad, dy, x, offsets)

        ctx.sink.submit(weight, accumulate)
        return grouped_gemm.grouped_mm_input_grad(dy, weight, offsets), None, None, None


class _SplitEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: WeightGradSink) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.sink = weight, sink
        return weight.index_select(0, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors

        def accumulate(main_grad: Tensor) -> None:
            main_grad.index_add_(0, ids, dy.to(main_grad.dtype))

        ctx.sink.submit(ctx.weight, accumulate)
        return None, None, None


class _GroupedLinear(torch.autograd.Function):
    """Plain autograd over the same kernels, so that float64 and odd widths have a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return grouped_gemm.grouped_mm(x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, offsets = ctx.saved_tensors
        dy = dy.contiguous()
        return (
            grouped_gemm.grouped_mm_input_grad(dy, weight, offsets),
            grouped_gemm.grouped_mm_weight_grad(dy, x, offsets),
            None,
        )


def linear(
    x: Tensor, weight: Tensor, sink: WeightGradSink | None, bias: Tensor | None = None
) -> Tensor:
    """x (T, K) times weight (M, K) transposed, plus bias (M)."""
    if sink is None or not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _SplitLinear.apply(x, weight, bias, sink)


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor | int, sink: WeightGradSink | None
) -> Tensor:
    """Rows x (N, K), group by group, times weight (e, M, K) transposed.

    `offsets` are the groups' end rows, or how many rows each has (without gradients only).
    """
    if isinstance(offsets, int):
        assert not torch.is_grad_enabled(), "equal groups are for inference"
        return torch.bmm(x.unflatten(0, (-1, offsets)), weight.transpose(1, 2)).flatten(0, 1)
    if not torch.is_grad_enabled():
        return grouped_gemm.grouped_mm(x, weight, offsets)
    if sink is None:
        return _GroupedLinear.apply(x, weight, offsets)
    return _SplitGroupedLinear.apply(x, weight, offsets, sink)


class Linear(nn.Module):
    """`weight` (out_features, in_features), and `bias` (out_features) where asked for.

    One GEMM may do for several projections of the same input: `out_features` is then the width
    of each by name, and weight and bias hold them back to back.
    """

    def __init__(
        self, in_features: int, out_features: int | Mapping[str, int], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.parts = {} if isinstance(out_features, int) else dict(out_features)
        width = out_features if isinstance(out_features, int) else sum(self.parts.values())
        self.weight = nn.Parameter(torch.empty(width, in_features))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor, sink: WeightGradSink | None) -> Tensor:
        return linear(x, self.weight, sink, self.bias)


class Embedding(nn.Module):
    """Token embedding; `weight` is (vocab_size, hidden_size)."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, ids_T: Tensor, sink: WeightGradSink | None) -> Tensor:
        if sink is None or not torch.is_grad_enabled():
            return F.embedding(ids_T, self.weight)
        return _SplitEmbedding.apply(ids_T, self.weight, sink)
