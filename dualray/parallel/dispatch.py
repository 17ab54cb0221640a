"""Expert dispatch over the expert ranks of a stage: all-to-all there and back.

T tokens, K choices, N = T*K rows here, M rows received, E experts, C copies at most, S slots of all
ranks, s of this one. An expert's copies take its tokens in turn. Counts travel first as one int64
all-to-all, while the rows are put into order, then the rows with uneven splits; a rank without
tokens still takes part. Rows arrive ordered by (source rank, slot, token) and are put in order by
slot, so that within a slot they keep the order (source rank, token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.kernels.combine import combine
from dualray.kernels.grouped_gemm import row_multiple
from dualray.kernels.permute import permute, replicate, sort_by_key
from dualray.model.context import Dispatched, Routing
from dualray.parallel.arrival import into_slots
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.slots import ExpertPlacement


@dataclass(kw_only=True)
class _WayBack:
    layer: int
    order_N: Tensor
    inverse_N: Tensor
    order: Tensor
    inverse_M: Tensor
    send: list[int]
    receive: list[int]
    gates_TK: Tensor


class SlotTable:
    """Where a layer's experts are: choices to physical slots."""

    def __init__(self, placement: ExpertPlacement, layer: int, device: torch.device) -> None:
        slots_of = placement.slots_of(layer)
        most = max(map(len, slots_of))
        self.slots = placement.slots(layer)
        """How many slots each rank has."""
        ranks = [rank for rank, count in enumerate(self.slots) for _ in range(count)]
        self.rank_S = torch.tensor(ranks, device=device)
        """Rank of each slot, int64."""
        rows = [[slots[copy % len(slots)] for copy in range(most)] for slots in slots_of]
        self._slot_EC = torch.tensor(rows, device=device)
        self._copies_E = torch.tensor([len(slots) for slots in slots_of], device=device)

    def choose(self, experts_TK: Tensor, first: int) -> Tensor:
        """(T, K) int64 slots. Of the choices that fall on an expert its copies take one each in
        turn, beginning at `first`, so that none gets more than one above another."""
        if self._slot_EC.shape[1] == 1:
            return self._slot_EC[:, 0][experts_TK]
        expert_N = experts_TK.flatten()
        _, place_N, counts_E = sort_by_key(expert_N, len(self._copies_E))
        turn_N = place_N - (counts_E.cumsum(0) - counts_E)[expert_N] + first
        return self._slot_EC[expert_N, turn_N % self._copies_E[expert_N]].view_as(experts_TK)


class AllToAllDispatch:
    """`ExpertDispatch` over a process group. Its twin is `LocalDispatch`.

    `exchange` carries the rows; a worker's dispatches share one. `rows[layer]` counts, if it is
    given, what the slots of this rank were sent.
    """

    def __init__(
        self,
        placement: ExpertPlacement,
        ways: Ways,
        device: torch.device,
        exchange: Exchange,
        rows: dict[int, Tensor] | None = None,
    ) -> None:
        self._ways = ways
        self._exchange = exchange
        self._rank = ways.rows.rank()
        self._device = device
        self._rows = rows
        self.place(placement)

    def place(self, placement: ExpertPlacement) -> None:
        """Send tokens to the slots of another placement from now on, as all ranks must.

        No dispatched rows may be under way. What `rows` has counted is of the slots before.
        """
        self._tables = {
            layer: SlotTable(placement, layer, self._device) for layer in placement.held
        }

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched:
        table, ranks = self._tables[layer], self._ways.rows.size()
        slots = table.slots[self._rank]
        key_N = table.choose(routing.experts_TK, self._rank).flatten()
        order_N, inverse_N, counts = sort_by_key(key_N, sum(table.slots))
        counted = self._exchange.start_counts(counts, [slots] * ranks, table.slots, self._ways.rows)
        rows_ND = replicate(x_TD, order_N, inverse_N)
        send = counts.new_zeros(ranks).scatter_add_(0, table.rank_S, counts).tolist()
        received = counted()
        counts_Rs = received.view(ranks, slots)
        receive = counts_Rs.sum(1).tolist()
        note_rows(self._rows, layer, counts_Rs.sum(0))
        rows_MD = self._exchange(rows_ND, receive, send, self._ways, f"dispatch {layer}")
        runs = torch.arange(ranks * slots, device=x_TD.device)
        multiple = routing.row_multiple or row_multiple(x_TD, len(rows_MD) // slots)
        order, inverse_M, rows = into_slots(counts_Rs, runs, len(rows_MD), multiple)
        return Dispatched(
            rows_ND=permute(rows_MD, order, inverse_M),
            offsets=rows.cumsum(0).to(torch.int32),
            state=_WayBack(
                layer=layer,
                order_N=order_N,
                inverse_N=inverse_N,
                order=order,
                inverse_M=inverse_M,
                send=send,
                receive=receive,
                gates_TK=routing.gates_TK,
            ),
        )

    def combine(self, y_ND: Tensor, dispatched: Dispatched) -> Tensor:
        way: _WayBack = dispatched.state
        arrived = permute(y_ND, way.inverse_M, way.order)
        name = f"combine {way.layer}"
        rows_ND = self._exchange(arrived, way.send, way.receive, self._ways, name)
        return combine(rows_ND, way.gates_TK, way.order_N, way.inverse_N)


def note_rows(rows: dict[int, Tensor] | None, layer: int, counts_s: Tensor) -> None:
    """Add int64 rows per local slot to what is counted, if anybody counts."""
    if rows is not None:
        rows[layer] = rows[layer] + counts_s if layer in rows else counts_s
