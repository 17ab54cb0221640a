"""Expert dispatch that sends a token to each node once (arXiv 2412.19437, section 3.2.2).

A token's row crosses to every node that it has chosen experts on, to one rank there, its relay,
which fans it out to the choices' ranks, adds up what they return, weighted with the gates, and
sends one row back. With groups of experts whole on nodes, a token reaches at most `topk_group`
nodes. With one node nothing crosses, and the way within it is the flat all-to-all.

    dispatch            source -> relay: row, its slots there, gates    relay -> expert: rows
    combine             expert -> relay: rows                           relay -> source: sum
    combine gradient    source -> relay: row                            relay -> expert: rows
    dispatch gradient   expert -> relay: rows                           relay -> source: sum, gates

Rows on their way to experts, dispatched or gradients, may travel in FP8; what is added up comes
back in the activations' dtype (section 3.3.3). A relay passes codes on as they are, so that a row
is rounded once; a gradient in FP8 therefore meets its gate where it arrives. Letters are those of
`node_route`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.kernels.combine import gate_grads
from dualray.kernels.grouped_gemm import row_multiple
from dualray.kernels.permute import permute
from dualray.kernels.ragged_sum import ragged_sum, weighted_rows
from dualray.model.context import Dispatched, Routing
from dualray.parallel.arrival import into_slots
from dualray.parallel.dispatch import note_rows
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Group, Ways
from dualray.parallel.node_route import RelayRows, Route, SourceRows
from dualray.parallel.node_table import NodeTable
from dualray.parallel.nodes import NodeMap
from dualray.parallel.payload import Fp8Rows, PlainRows, Records, RowCode, choice_dtype
from dualray.parallel.slots import ExpertPlacement


class NodeLimitedDispatch:
    """`ExpertDispatch` over nodes. Its twin is `AllToAllDispatch`, bit for bit in what experts
    are given; sums are made node by node.

    `exchange` carries the rows; a worker's dispatches share one. `rows[layer]` counts, if it is
    given, what the slots of this rank were sent. `fp8` sends rows to experts in FP8.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        ways: Ways,
        device: torch.device,
        exchange: Exchange,
        rows: dict[int, Tensor] | None = None,
        *,
        nodes: NodeMap,
        fp8: bool = False,
    ) -> None:
        self.ways, self.exchange, self.nodes = ways, exchange, nodes
        self.code: RowCode = Fp8Rows() if fp8 else PlainRows()
        self.weighs_late = fp8
        """Whether experts' ranks weigh gradients, and not relays."""
        self._rank = ways.rows.rank()
        self._device = device
        self._rows = rows
        self.place(placement)

    def place(self, placement: ExpertPlacement) -> None:
        """Send tokens to the slots of another placement from now on, as all ranks must.

        No dispatched rows may be under way. What `rows` has counted is of the slots before.
        """
        self._tables = {
            layer: NodeTable(placement, layer, self.nodes, self._rank, self._device)
            for layer in placement.held
        }

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched:
        table = self._tables[layer]
        slot_TK = table.slots.choose(routing.experts_TK, self._rank)
        route = Route(layer, table, slot_TK, routing.row_multiple)
        rows_ND, gates_MK, rows_s = _Dispatch.apply(x_TD, routing.gates_TK, route, self)
        return Dispatched(
            rows_ND=rows_ND,
            offsets=rows_s.cumsum(0).to(torch.int32),
            state=(route, gates_MK),
        )

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        route, gates_MK = dispatched.state
        return _Combine.apply(y_ND, gates_MK, route, self)

    def fill(
        self, route: Route, rows_n: list[int], rows_R: Tensor, heard: Tensor, x_TD: Tensor
    ) -> Tensor:
        """Splits, and where arriving rows belong; returns int64 rows per slot, padding included."""
        table = route.table
        route.splits, rows_Rs = table.splits(rows_n, rows_R, heard)
        note_rows(self._rows, route.layer, rows_Rs.sum(0))
        num_rows = sum(route.splits.receive_within)
        multiple = route.row_multiple or row_multiple(x_TD, num_rows // table.num_slots)
        route.order, route.inverse_N, rows_s = into_slots(rows_Rs, table.runs, num_rows, multiple)
        return rows_s

    def across(self, rows: Tensor, route: Route, name: str, *, back: bool, group: Group) -> Tensor:
        """Between nodes: from sources to relays, or back."""
        if self.nodes.num_nodes == 1:
            return rows
        splits = (route.splits.receive_across, route.splits.send_across)
        return self._swap(rows, splits, back, group, f"{name} across nodes")

    def within(self, rows: Tensor, route: Route, name: str, *, back: bool, group: Group) -> Tensor:
        """Within nodes: from relays to experts, or back."""
        if self.nodes.num_nodes == len(self.nodes.node_of):
            return rows
        splits = (route.splits.receive_within, route.splits.send_within)
        return self._swap(rows, splits, back, group, name)

    def _swap(
        self,
        rows: Tensor,
        splits: tuple[list[int], list[int]],
        back: bool,
        group: Group,
        name: str,
    ) -> Tensor:
        receive, send = reversed(splits) if back else splits
        return self.exchange.swap(rows, receive, send, group, name)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gates_TK: Tensor, route: Route, sender: NodeLimitedDispatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.route, ctx.sender = route, sender
        table, group = route.table, sender.ways.rows
        name, D, K = f"dispatch {route.layer}", x_TD.shape[1], gates_TK.shape[1]
        source = route.source = SourceRows(table, route.slot_TK)
        told, rows_R = table.counts(source.rows_n, route.slot_TK)
        counted = sender.exchange.start_counts(told, table.hears, table.told, group)
        # The rows are packed while the counts travel.
        rows_n = source.rows_n.tolist()
        coded_TW = sender.code.encode(x_TD)
        if table.num_nodes == 1:
            rows_s = sender.fill(route, rows_n, rows_R, counted(), x_TD)
            row_MW, gates_MK, slots_MK = coded_TW, gates_TK.clone(), route.slot_TK
        else:
            source.order(route.slot_TK, sum(rows_n))
            row, slots = sender.code.column(D, x_TD.dtype), choice_dtype(len(table.node_S))
            layout = Records(row, (gates_TK.dtype, K), (slots, K))
            records = layout.empty(sum(rows_n), x_TD.device)
            row_AW, gates_AK, slots_AK = layout.columns(records)
            torch.index_select(coded_TW, 0, source.token_A, out=row_AW)
            gates_AK.copy_(gates_TK[source.token_A])
            slots_AK.copy_(source.slots_AK)
            rows_s = sender.fill(route, rows_n, rows_R, counted(), x_TD)
            records = sender.across(records, route, name, back=False, group=group)
            row_MW, gates_MK, slots_MK = layout.columns(records)
        relay = route.relay = RelayRows(slots_MK, len(table.node_S), sum(route.splits.send_within))
        coded_PW = row_MW.index_select(0, relay.row_P)
        coded_NW = sender.within(coded_PW, route, name, back=False, group=group)
        sorted_NW = permute(coded_NW, route.order, route.inverse_N)
        rows_ND = sender.code.decode(sorted_NW, D, x_TD.dtype)
        ctx.mark_non_differentiable(rows_s)
        return rows_ND, gates_MK.contiguous(), rows_s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_rows_ND: Tensor, d_gates_MK: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        route, sender = ctx.route, ctx.sender
        name, group = f"dispatch {route.layer} gradient", sender.ways.gradients
        arrived_ND = permute(d_rows_ND, route.inverse_N, route.order)
        d_rows_PD = sender.within(arrived_ND, route, name, back=True, group=group)
        d_row_MD = ragged_sum(d_rows_PD, route.relay.member_P, route.relay.sizes_M)
        if route.table.num_nodes == 1:
            return d_row_MD, d_gates_MK, None, None
        K = d_gates_MK.shape[1]
        layout = Records((d_row_MD.dtype, d_row_MD.shape[1]), (d_gates_MK.dtype, K))
        records = layout.empty(len(d_row_MD), d_row_MD.device)
        for column, values in zip(layout.columns(records), (d_row_MD, d_gates_MK)):
            column.copy_(values)
        records = sender.across(records, route, name, back=True, group=group)
        d_row_AD, d_gates_AK = layout.columns(records)
        dx_TD = ragged_sum(d_row_AD, route.source.member_A, route.source.sizes_T)
        choice_TK = route.source.row_TK * K + torch.arange(K, device=dx_TD.device)
        return dx_TD, d_gates_AK.flatten()[choice_TK], None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, gates_MK: Tensor, route: Route, sender: NodeLimitedDispatch
    ) -> Tensor:
        ctx.route, ctx.sender = route, sender
        name, group, relay = f"combine {route.layer}", sender.ways.rows, route.relay
        arrived_ND = permute(y_ND, route.inverse_N, route.order)
        y_PD = sender.within(arrived_ND, route, name, back=True, group=group)
        ctx.save_for_backward(y_PD, gates_MK)
        gate_P = gates_MK.flatten()[relay.choice_P]
        sum_MD = ragged_sum(y_PD, relay.member_P, relay.sizes_M, gate_P)
        if route.table.num_nodes == 1:
            return sum_MD
        sum_AD = sender.across(sum_MD, route, name, back=True, group=group)
        return ragged_sum(sum_AD, route.source.member_A, route.source.sizes_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        route, sender, relay = ctx.route, ctx.sender, ctx.route.relay
        y_PD, gates_MK = ctx.saved_tensors
        name, group, D = f"combine {route.layer} gradient", sender.ways.gradients, dy_TD.shape[1]
        coded_AW = sender.code.encode(dy_TD)
        if route.table.num_nodes > 1:
            coded_AW = coded_AW.index_select(0, route.source.token_A)
        coded_MW = sender.across(coded_AW, route, name, back=False, group=group)
        dy_MD = sender.code.decode(coded_MW, D, dy_TD.dtype)
        gate_P = relay.by_slot(gates_MK)
        d_gate_P = gate_grads(dy_MD, y_PD, relay.row_P[:, None]).flatten()
        d_gates_MK = relay.by_choice(d_gate_P, gates_MK)
        if not sender.weighs_late:
            d_y_PD = weighted_rows(dy_MD, relay.row_P, gate_P)
            d_y_ND = sender.within(d_y_PD, route, name, back=False, group=group)
            return permute(d_y_ND, route.order, route.inverse_N), d_gates_MK, None, None
        layout = Records(sender.code.column(D, dy_TD.dtype), (gate_P.dtype, 1))
        records = layout.empty(len(gate_P), dy_TD.device)
        row_PW, gate_P1 = layout.columns(records)
        torch.index_select(coded_MW, 0, relay.row_P, out=row_PW)
        gate_P1.copy_(gate_P[:, None])
        records = sender.within(records, route, name, back=False, group=group)
        row_NW, gate_N1 = layout.columns(records)
        dy_ND = sender.code.decode(row_NW, D, dy_TD.dtype)
        place_N = route.order.clamp(min=0)
        weight_N = gate_N1.flatten()[place_N].masked_fill_(route.order < 0, 0)
        return weighted_rows(dy_ND, place_N, weight_N), d_gates_MK, None, None
