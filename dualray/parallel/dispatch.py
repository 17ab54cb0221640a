"""Expert dispatch over the expert ranks of a stage: all-to-all there and back.

T tokens, K choices, N = T*K rows here, M rows received, R expert ranks, s slots per rank.
Counts travel first as one int64 all-to-all, while the rows are put into order, then the rows
with uneven splits; a rank without tokens still takes part. Rows arrive ordered by (source rank,
slot, token) and are sorted by slot, so that within a slot they keep the order (source rank,
token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.kernels.combine import combine
from dualray.kernels.grouped_gemm import row_multiple
from dualray.kernels.permute import permute, replicate, sort_by_key
from dualray.model.context import Dispatched, Routing
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.placement import ExpertPlacement


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


class AllToAllDispatch:
    """`ExpertDispatch` over a process group. Its twin is `LocalDispatch`.

    `exchange` carries the rows; a worker's dispatches share one.
    """

    def __init__(
        self, placement: ExpertPlacement, ways: Ways, device: torch.device, exchange: Exchange
    ) -> None:
        self._placement = placement
        self._ways = ways
        self._exchange = exchange
        self._num_ranks = ways.rows.size()
        self._home_E = {
            layer: torch.tensor(placement.home_slots(layer), device=device)
            for layer in placement.held
        }

    def dispatch(self, layer: int, x_TD: Tensor, routing: Routing) -> Dispatched:
        ranks, slots = self._num_ranks, self._placement.slots_per_rank(layer)
        key_N = self._home_E[layer][routing.experts_TK].flatten()
        order_N, inverse_N, counts = sort_by_key(key_N, ranks * slots)
        counted = self._exchange.start_counts(counts, self._ways.rows)
        rows_ND = replicate(x_TD, order_N, inverse_N)
        send = counts.view(ranks, slots).sum(1).tolist()
        received = counted()
        receive = received.view(ranks, slots).sum(1).tolist()
        rows_MD = self._exchange(rows_ND, receive, send, self._ways, f"dispatch {layer}")
        slot_of_run = torch.arange(slots, device=x_TD.device).repeat(ranks)
        slot_M = torch.repeat_interleave(slot_of_run, received, output_size=sum(receive))
        order, inverse_M, rows = sort_by_key(
            slot_M, slots, row_multiple(x_TD, len(slot_M) // slots)
        )
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
