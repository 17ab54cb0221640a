"""Which node every expert rank of a group is on, and who passes on what comes from other nodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


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

    def ranks_on(self, node: int) -> tuple[int, ...]:
        """The ranks of a node, ascending."""
        return tuple(rank for rank, its in enumerate(self.node_of) if its == node)

    def relay(self, source: int, node: int) -> int:
        """Who takes what rank `source` sends to `node`, and passes it on there.

        On the source's own node it is the source. Elsewhere ranks take turns by their number
        within their node, so that each relays for as many sources as the others, or one more.
        """
        own = self.ranks_on(self.node_of[source])
        there = self.ranks_on(node)
        if self.node_of[source] == node:
            return source
        return there[own.index(source) % len(there)]

    def across(self, rank: int, sent_bytes: Mapping[int, int]) -> int:
        """Of the bytes that `rank` sent to each rank those that went to other nodes."""
        own = self.node_of[rank]
        return sum(count for other, count in sent_bytes.items() if self.node_of[other] != own)
