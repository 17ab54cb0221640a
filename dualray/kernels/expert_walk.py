"""SwiGLU FFNs of experts whose rows are adjacent, one expert after the other.

Between its two products an expert's rows stay in a core's cache. Gate, up and silu(gate) are kept;
the backward writes the gradients of gate and up over the former, and over the latter the hidden
rows that the weight gradient needs. What is kept are tensors for each expert, small enough for
memory that was used before. Larger ones are new from the system each time, with a page fault every
4 kB: 28 of 280 ms for 16384 rows, 256 wide, fp32, on one core.

N rows in e groups, D model, F expert width, G = 2F for gate and up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dualray.kernels.grouped_gemm import add_weight_grad
from dualray.kernels.swiglu import swiglu_grad_, swiglu_into

_ROWS_PER_GROUP = 64
"""From here on a product takes longer than starting it, so that a loop over groups costs little."""


def walk_pays(rows_ND: Tensor, num_groups: int) -> bool:
    """Whether to walk: on a CPU, and with rows enough in a group. Nothing compiles the loop."""
    if torch.compiler.is_compiling() or rows_ND.device.type != "cpu":
        return False
    return rows_ND.shape[0] >= _ROWS_PER_GROUP * num_groups


def groups(ends_e: list[int]) -> Iterator[tuple[int, slice]]:
    """Every group that has rows, and where they are."""
    start = 0
    for group, end in enumerate(ends_e):
        if start < end:
            yield group, slice(start, end)
        start = end


def _largest(ends_e: list[int]) -> int:
    return max((rows.stop - rows.start for _, rows in groups(ends_e)), default=0)


def experts(
    rows_ND: Tensor, gate_up_eGD: Tensor, down_eDF: Tensor, ends_e: list[int], *, keep: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Outputs (N, D), and if they are to be kept each group's gate and up, and silu of its gate.

    No gradients. Of a group with n rows (n, G) and (n, F) are kept; of an empty one nothing.
    """
    F = down_eDF.shape[2]
    out_ND = rows_ND.new_empty(rows_ND.shape)
    largest = _largest(ends_e)
    reused, hidden = rows_ND.new_empty(0 if keep else largest, 2 * F), rows_ND.new_empty(largest, F)
    up_weight, down_weight = gate_up_eGD.transpose(1, 2), down_eDF.transpose(1, 2)
    kept, silus = [], []
    for group, rows in groups(ends_e):
        length = rows.stop - rows.start
        gate_up = rows_ND.new_empty(length, 2 * F) if keep else reused[:length]
        silu = rows_ND.new_empty(length, F) if keep else hidden[:length]
        torch.mm(rows_ND[rows], up_weight[group], out=gate_up)
        swiglu_into(gate_up, silu, hidden[:length])
        torch.mm(hidden[:length], down_weight[group], out=out_ND[rows])
        if keep:
            kept.append(gate_up)
            silus.append(silu)
    return out_ND, kept, silus


def experts_grad(
    dy_ND: Tensor,
    kept: Sequence[Tensor],
    silus: Sequence[Tensor],
    gate_up_eGD: Tensor,
    down_eDF: Tensor,
    ends_e: list[int],
) -> Tensor:
    """Gradient of the rows (N, D). `kept` become their own gradients, `silus` the hidden rows."""
    dx_ND = dy_ND.new_empty(dy_ND.shape)
    d_hidden = dy_ND.new_empty(_largest(ends_e), down_eDF.shape[2])
    for gate_up, silu, (group, rows) in zip(kept, silus, groups(ends_e)):
        dh = d_hidden[: len(gate_up)]
        torch.mm(dy_ND[rows], down_eDF[group], out=dh)
        swiglu_grad_(gate_up, silu, dh)
        torch.mm(gate_up, gate_up_eGD[group], out=dx_ND[rows])
    return dx_ND


def add_experts_weight_grad(
    sum_eMK: Tensor, dy_e: Sequence[Tensor], x_e: Sequence[Tensor], ends_e: list[int]
) -> None:
    """Add every group's dy^T x to its part of `sum_eMK`; the lists are of the groups with rows."""
    for dy_NM, x_NK, (group, _) in zip(dy_e, x_e, groups(ends_e)):
        add_weight_grad(sum_eMK[group], dy_NM, x_NK)
