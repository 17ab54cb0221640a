"""One dispatch of one rank: which of its rows is whose, as a source, a relay and an expert rank.

T tokens and K choices of this source, n nodes, A rows that it sends (one of a token for each node);
M rows that this rank takes in as a relay, P rows that it passes on (one for each choice on its
node); N rows that it receives for its slots. What is sent back takes the same places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualray.kernels.permute import sort_by_key
from dualray.parallel.node_table import NodeTable, Splits


class SourceRows:
    """The rows of a source: ordered by relay, thus by node, then by token."""

    def __init__(self, table: NodeTable, slot_TK: Tensor) -> None:
        self._table = table
        self._node_TK = table.node_S[slot_TK]
        T = len(slot_TK)
        goes_Tn = slot_TK.new_zeros(T, table.num_nodes, dtype=torch.bool)
        self._goes_Tn = goes_Tn.scatter_(1, self._node_TK, True)
        self.rows_n = goes_Tn.sum(0)
        """Rows for each node."""
        self.sizes_T = goes_Tn.sum(1)
        """How many nodes each token goes to."""

    def order(self, slot_TK: Tensor, num_rows: int) -> None:
        """Find places for `num_rows`, all of them."""
        table, T = self._table, len(slot_TK)
        goes_nT = self._goes_Tn.t()[table.leaving_n]
        cell_A = _true(goes_nT, num_rows)
        self.token_A = cell_A % max(T, 1)
        node_A = table.leaving_n[cell_A.div(max(T, 1), rounding_mode="floor")]
        on_node_AK = self._node_TK[self.token_A] == node_A[:, None]
        self.slots_AK = slot_TK[self.token_A].masked_fill_(~on_node_AK, -1)
        """Slots of those choices that are on the row's node, -1 for the others."""
        row_Tn = (goes_nT.flatten().cumsum(0) - 1).view_as(goes_nT)[table.place_n].t()
        self.member_A = row_Tn.flatten()[_true(self._goes_Tn, num_rows)]
        """Rows by token and node."""
        self.row_TK = row_Tn.gather(1, self._node_TK)
        """The row that each choice went with."""


class RelayRows:
    """The rows of a relay: ordered by source and token as they come, by slot as they go on."""

    def __init__(self, slots_MK: Tensor, num_slots: int, num_rows: int) -> None:
        """`slots_MK` are -1 where a choice is on another node; `num_rows` is P."""
        held_MK = slots_MK >= 0
        self.sizes_M = held_MK.sum(1)
        self.choice_P = _true(held_MK, num_rows)
        """Which of the M * K choices each row is for, by token."""
        self._order_P, self.member_P, _ = sort_by_key(
            slots_MK.flatten()[self.choice_P].long(), num_slots
        )
        self.row_P = self.choice_P[self._order_P].div(slots_MK.shape[1], rounding_mode="floor")
        """Which of the M rows each row is, by slot; `member_P` is where each is, by token."""

    def by_slot(self, value_MK: Tensor) -> Tensor:
        """(P,) values of the choices in the order of their rows."""
        return value_MK.flatten()[self.choice_P[self._order_P]]

    def by_choice(self, value_P: Tensor, like_MK: Tensor) -> Tensor:
        """Values of rows by slot back to their choices, 0 where a choice is on another node."""
        value_MK = torch.zeros_like(like_MK)
        value_MK.view(-1)[self.choice_P[self._order_P]] = value_P.to(like_MK.dtype)
        return value_MK


class Route:
    """All of it. Whoever sends fills it in as messages arrive."""

    source: SourceRows
    splits: Splits
    relay: RelayRows
    order: Tensor
    inverse_N: Tensor

    def __init__(
        self, layer: int, table: NodeTable, slot_TK: Tensor, row_multiple: int | None = None
    ) -> None:
        self.layer = layer
        self.table = table
        self.slot_TK = slot_TK
        self.row_multiple = row_multiple


def _true(mask: Tensor, count: int) -> Tensor:
    """Flat places of the `count` true values. Knowing how many saves waiting for a GPU."""
    return torch.nonzero_static(mask.flatten(), size=count).squeeze(1)
