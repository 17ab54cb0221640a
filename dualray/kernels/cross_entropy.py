"""The head and its cross-entropy as one operation, over chunks of rows.

The logits of all tokens never exist: a chunk's are turned into their own gradient while
they are at hand, and that into gradients of the input and of the weight. So the gradients
are made in the forward, which costs no second pass over the vocabulary, and the backward
only scales them. What waits in between is as large as the input and the weight, whatever
the number of tokens is.

T tokens, D model, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Submit = Callable[[Tensor, Callable[[Tensor], None]], None]
"""Takes (weight, accumulate); `accumulate(main_grad)` adds the weight's gradient later."""

CHUNK_ROWS = 256
"""8 MiB of fp32 logits at a vocabulary of 8192, 126 MiB at 129280."""


def linear_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, submit: Submit | None = None
) -> Tensor:
    """Sum of the cross-entropies of x times weight transposed, in nats: a scalar.

    Rows with a negative label count nothing. Logits come in the dtype of x, as a head's do;
    softmax and sum are fp32 (float64 for float64). With `submit` the gradient of the weight
    is handed there in the backward and autograd sees none.
    """
    gradients = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, submit, gradients)


def linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor) -> Tensor:
    """The slow twin: all logits at once, and plain autograd."""
    logits = F.linear(x_TD, weight_VD)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels_T >= 0
    return F.cross_entropy(logits[valid], labels_T[valid], reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        labels_T: Tensor,
        submit: Submit | None,
        gradients: bool,
    ) -> Tensor:
        compute = torch.promote_types(x_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=compute, device=x_TD.device)
        dx_TD = torch.empty_like(x_TD) if gradients else x_TD
        dw_VD = torch.zeros_like(weight_VD, dtype=compute) if gradients else weight_VD
        # One buffer for every chunk; the wide one is the same where no precision is added.
        num_rows = min(CHUNK_ROWS, x_TD.shape[0])
        narrow = x_TD.new_empty(num_rows, weight_VD.shape[0])
        wide = narrow.to(compute)
        for start in range(0, x_TD.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x_RD, label_R1 = x_TD[rows], labels_T[rows, None]
            valid_R1, label_R1 = label_R1 >= 0, label_R1.clamp(min=0)
            logits_RV, exp_RV = narrow[: len(x_RD)], wide[: len(x_RD)]
            torch.mm(x_RD, weight_VD.t(), out=logits_RV)
            torch.sub(exp_RV.copy_(logits_RV), logits_RV.amax(-1, keepdim=True), out=exp_RV)
            chosen_R1 = exp_RV.gather(1, label_R1)
            sum_R1 = exp_RV.exp_().sum(-1, keepdim=True)
            total += ((sum_R1.log() - chosen_R1) * valid_R1).sum()
            if gradients:
                # (softmax - one hot) * sum: dividing the small factors spares a pass over V.
                exp_RV.scatter_(1, label_R1, exp_RV.gather(1, label_R1) - sum_R1)
                d_logits_RV = logits_RV.copy_(exp_RV)
                scale_R1 = valid_R1 / sum_R1
                dx_TD[rows] = (d_logits_RV @ weight_VD) * scale_R1
                _add_mm(dw_VD, d_logits_RV.t(), (x_RD * scale_R1).to(x_TD.dtype))
        if gradients:
            ctx.save_for_backward(dx_TD, dw_VD)
            # Not saved: what comes back from there may be another object, without its main_grad.
            ctx.weight_VD, ctx.submit = weight_VD, submit
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (dx_TD, dw_VD), weight_VD = ctx.saved_tensors, ctx.weight_VD
        dx = dx_TD * dy.to(dx_TD.dtype)
        if ctx.submit is None:
            return dx, (dw_VD * dy).to(weight_VD.dtype), None, None, None

        def accumulate(main_grad: Tensor) -> None:
            # The scale stays on its device: reading it would wait for a GPU.
            main_grad.addcmul_(dw_VD, dy.to(main_grad.dtype))

        ctx.submit(weight_VD, accumulate)
        return dx, None, None, None, None


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    else:
        total.add_(a @ b)
