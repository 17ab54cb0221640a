"""A layer's slots and the nodes between them and one rank, and what counts say of every message.

R ranks, n nodes, L ranks of this node, S slots of all ranks, s of this one. A source sends a
token's row once to each node that it has chosen experts on, to a relay, and the relay to the ranks
of its node. Before that every rank tells every other [rows for it as a relay; rows for each rank of
its node by way of it; rows for each of its slots]: then each knows how many rows it will send and
receive on both legs, although it is not told what others tell its neighbours. With one node nobody
relays for others, and only slots are told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualray.parallel.dispatch import SlotTable
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Rows that a rank sends to and receives from each rank: between nodes, and within its own."""

    send_across: list[int]
    receive_across: list[int]
    send_within: list[int]
    receive_within: list[int]


class NodeTable:
    """Of one rank and one layer."""

    def __init__(
        self,
        placement: ExpertPlacement,
        layer: int,
        nodes: NodeMap,
        rank: int,
        device: torch.device,
    ) -> None:
        self.slots = SlotTable(placement, layer, device)
        self.num_nodes = nodes.num_nodes
        self.num_slots = self.slots.slots[rank]
        ranks, num_ranks = range(len(nodes.node_of)), len(nodes.node_of)
        self._num_ranks = num_ranks
        here = nodes.node_of[rank]
        self._here = nodes.ranks_on(here)
        self._relays = [nodes.relay(rank, node) for node in range(self.num_nodes)]
        self._relay_of = [nodes.relay(source, here) for source in ranks]
        """Of each source on its way to this node."""
        leaving = sorted(range(self.num_nodes), key=self._relays.__getitem__)
        self.leaving_n = torch.tensor(leaving, device=device)
        """Nodes in the order in which their rows are sent, that of the relays."""
        self.place_n = torch.argsort(self.leaving_n)
        """Where each node is in that order."""
        self.node_S = torch.tensor(nodes.node_of, device=device)[self.slots.rank_S]
        self._build_counts(nodes, rank, device)
        sources = [[s for s in ranks if self._relay_of[s] == relay] for relay in self._here]
        runs = [
            source * self.num_slots + slot
            for relayed in sources
            for slot in range(self.num_slots)
            for source in relayed
        ]
        self.runs = torch.tensor(runs, device=device)
        """Cells (source, slot) in the order in which relays send their rows."""

    def _build_counts(self, nodes: NodeMap, rank: int, device: torch.device) -> None:
        """Which numbers every rank is told, as places in [0; rows per node, per rank, per slot]."""
        first_rank = 1 + self.num_nodes
        first_slot = first_rank + self._num_ranks
        told: list[int] = []
        self.told: list[int] = []
        """How many numbers each rank is told."""
        for other, node in enumerate(nodes.node_of):
            message: list[int] = []
            if self.num_nodes > 1:
                is_relay = self._relays[node] == other
                message = [1 + node if is_relay else 0]
                message += [first_rank + its if is_relay else 0 for its in nodes.ranks_on(node)]
            message += range(first_slot, first_slot + self.slots.slots[other])
            first_slot += self.slots.slots[other]
            told += message
            self.told.append(len(message))
        self._told = torch.tensor(told, device=device)

    @property
    def hears(self) -> list[int]:
        """How many numbers this rank is told by each."""
        relayed = 1 + len(self._here) if self.num_nodes > 1 else 0
        return [relayed + self.num_slots] * self._num_ranks

    def counts(self, rows_n: Tensor, slot_TK: Tensor) -> tuple[Tensor, Tensor]:
        """What to tell all ranks, and the rows for each rank (R,); int64. `rows_n` are those for
        each node."""
        rows_S = rows_n.new_zeros(len(self.node_S))
        key_N = slot_TK.flatten()
        rows_S.scatter_add_(0, key_N, torch.ones_like(key_N))
        rows_R = rows_n.new_zeros(self._num_ranks).scatter_add_(0, self.slots.rank_S, rows_S)
        return torch.cat([rows_n.new_zeros(1), rows_n, rows_R, rows_S])[self._told], rows_R

    def splits(self, rows_n: list[int], rows_R: Tensor, heard: Tensor) -> tuple[Splits, Tensor]:
        """All splits, from the rows for each node and rank and what was heard; and the rows (R, s)
        int64 of each source for each slot of this rank. Waits for a GPU."""
        heard_R = heard.view(self._num_ranks, -1)
        rows_Rs = heard_R[:, heard_R.shape[1] - self.num_slots :]
        if self.num_nodes > 1:
            across_R, within_L = heard_R[:, 0], heard_R[:, 1 : 1 + len(self._here)].sum(0)
        else:
            across_R, within_L = torch.zeros_like(rows_R), rows_R
        numbers = torch.cat([across_R, within_L, rows_Rs.sum(1)]).tolist()
        receive_across = numbers[: self._num_ranks]
        sent = numbers[self._num_ranks : -self._num_ranks]
        send_across, send_within, receive_within = ([0] * self._num_ranks for _ in range(3))
        for node, relay in enumerate(self._relays):
            send_across[relay] = rows_n[node]
        for neighbour, rows in zip(self._here, sent):
            send_within[neighbour] = rows
        for relay, rows in zip(self._relay_of, numbers[-self._num_ranks :]):
            receive_within[relay] += rows
        splits = Splits(
            send_across=send_across,
            receive_across=receive_across,
            send_within=send_within,
            receive_within=receive_within,
        )
        return splits, rows_Rs
