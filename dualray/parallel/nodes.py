"""Which node every expert rank of a group is on, and who passes on what comes from other nodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class NodeMap:
    """`node_of[rank]` is the node of an expert rank: 0 to `num_nodes` - 1, in any order.

    Nodes may have different numbers of ranks, and no rank need be next to another of its node.
    """

    node_of: tuple[int, ...]

    def __post_init__(self) -> None:
        assert set(self.node_of) == set(range(self.num_nodes)), self.node_of

    @staticmethod
    def of(hosts: Sequence[Hashable]) -> NodeMap:
        """From what tells the node of each rank from others, as a name; numbered as they come."""
        numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
        return NodeMap(node_of=tuple(numbers[host] for host in hosts))

    @property
    def num_nodes(self) -> int:
        return max(self.node_of, default=-1) + 1

    @cached_property
    def _ranks_on(self) -> dict[int, tuple[int, ...]]:
        ranks: dict[int, list[int]] = {}
        for rank, node in enumerate(self.node_of):
            ranks.setdefault(node, []).append(rank)
        return {node: tuple(its) for node, its in ranks.items()}

    def ranks_on(self, node: int) -> tuple[int, ...]:
        """The ranks of a node, ascending."""
        return self._ranks_on[node]

    def relay(self, source: int, node: int) -> int:
        """Who takes what rank `source` sends to `node`, and passes it on there.

        On the source's own node it is the source. Elsewhere ranks take the sources of all other
        nodes in turn, so that none relays for more than one source above another; where nodes
        are equal, ranks send to those of their own number in other nodes.
        """
        own = self.node_of[source]
        if own == node:
            return source
        before = sum(len(self.ranks_on(other)) for other in range(own) if other != node)
        there = self.ranks_on(node)
        return there[(before + self.ranks_on(own).index(source)) % len(there)]

    def across(self, rank: int, sent_bytes: Mapping[int, int]) -> int:
        """Of the bytes that `rank` sent to each rank those that went to other nodes."""
        own = self.node_of[rank]
        return sum(count for other, count in sent_bytes.items() if self.node_of[other] != own)
