"""Bytes that a layer's dispatch and combine carry between nodes, from the routing alone.

T tokens of one source rank, K choices, n nodes. Rows make up nearly all of it; the int64 counts
that go before them depend on no token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.parallel.dispatch import SlotTable
from dualray.parallel.nodes import NodeMap
from dualray.parallel.payload import Fp8Rows, PlainRows, Records, choice_dtype
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class RowBytes:
    """Bytes of what travels for a row, there (dispatch) and back (combine), and of gradients."""

    dispatch: int
    combine: int
    combine_gradient: int
    dispatch_gradient: int


@dataclass(frozen=True, kw_only=True)
class CrossNodeBytes:
    """Of one source's tokens, by the other node; 0 at its own.

    `counts`, `dispatch` and `combine_gradient` leave the source's node; the others come back.
    """

    counts_n: list[int]
    dispatch_n: list[int]
    combine_n: list[int]
    combine_gradient_n: list[int]
    dispatch_gradient_n: list[int]

    @property
    def forward(self) -> int:
        """Without counts."""
        return sum(self.dispatch_n) + sum(self.combine_n)

    @property
    def backward(self) -> int:
        return sum(self.combine_gradient_n) + sum(self.dispatch_gradient_n)


def row_bytes(
    hidden_size: int,
    dtype: torch.dtype,
    num_choices: int,
    num_slots: int,
    *,
    node_limited: bool,
    fp8: bool = False,
) -> RowBytes:
    """Of activations (hidden_size,) in `dtype`, over `num_slots` slots of all ranks."""
    code = Fp8Rows() if fp8 else PlainRows()
    gate_dtype = torch.promote_types(dtype, torch.float32)
    coded = code.column(hidden_size, dtype)
    plain = Records((dtype, hidden_size)).record_bytes
    if not node_limited:
        gradient = Records(coded, (gate_dtype, 1)) if fp8 else Records(coded)
        return RowBytes(
            dispatch=Records(coded).record_bytes,
            combine=plain,
            combine_gradient=gradient.record_bytes,
            dispatch_gradient=plain,
        )
    gates, slots = (gate_dtype, num_choices), (choice_dtype(num_slots), num_choices)
    return RowBytes(
        dispatch=Records(coded, gates, slots).record_bytes,
        combine=plain,
        combine_gradient=Records(coded).record_bytes,
        dispatch_gradient=Records((dtype, hidden_size), gates).record_bytes,
    )


def cross_node_bytes(
    experts_TK: Tensor,
    placement: ExpertPlacement,
    layer: int,
    nodes: NodeMap,
    source: int,
    rows: RowBytes,
    *,
    node_limited: bool,
) -> CrossNodeBytes:
    """What rank `source` causes by routing its tokens to `experts_TK` in `layer`.

    A row crosses for every choice on another node; with `node_limited` once for every other node
    that a token has choices on.
    """
    table = SlotTable(placement, layer, experts_TK.device)
    node_S = torch.tensor(nodes.node_of, device=experts_TK.device)[table.rank_S]
    node_TK = node_S[table.choose(experts_TK, source)]
    choices_Tn = torch.stack([(node_TK == n).sum(1) for n in range(nodes.num_nodes)], 1)
    if node_limited:
        choices_Tn = choices_Tn.clamp(max=1)
    crossing_n = choices_Tn.sum(0).tolist()
    crossing_n[nodes.node_of[source]] = 0
    return CrossNodeBytes(
        counts_n=_counts(table.slots, nodes, source, node_limited=node_limited),
        dispatch_n=[count * rows.dispatch for count in crossing_n],
        combine_n=[count * rows.combine for count in crossing_n],
        combine_gradient_n=[count * rows.combine_gradient for count in crossing_n],
        dispatch_gradient_n=[count * rows.dispatch_gradient for count in crossing_n],
    )


def _counts(slots: list[int], nodes: NodeMap, source: int, *, node_limited: bool) -> list[int]:
    """Every rank is told of each of its slots, and over nodes also of what it relays."""
    told_n = [0] * nodes.num_nodes
    for rank, node in enumerate(nodes.node_of):
        if node != nodes.node_of[source]:
            relayed = 1 + len(nodes.ranks_on(node)) if node_limited else 0
            told_n[node] += (slots[rank] + relayed) * torch.int64.itemsize
    return told_n
