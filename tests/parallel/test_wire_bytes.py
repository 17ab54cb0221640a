"""Bytes between nodes as the kernel counts them, over network namespaces, against the formula."""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import tiny_config

from dualray.model.config import ModelConfig
from dualray.model.context import Routing
from dualray.model.router import choose_experts
from dualray.parallel.cross_node import CrossNodeBytes, RowBytes, cross_node_bytes, row_bytes
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.make_dispatch import make_dispatch
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement, contiguous_placement
from dualray.platform.bench.hosts import can_emulate_hosts, emulated_hosts
from dualray.platform.bench.ranks import Member, run_ranks

CPU = torch.device("cpu")
LAYER = 1
RANKS_PER_HOST = 2
WIDTH = 1024
PHASES = ("dispatch", "combine", "combine gradient", "dispatch gradient")
# Before rows gloo says that it has some and that it can take them, and both name them: headers of
# 48 bytes, three of them for every message.
MESSAGE_BYTES = 144


@dataclass(frozen=True)
class Kind:
    node_limited: bool
    fp8: bool
    dtype: torch.dtype


FLAT = Kind(False, False, torch.bfloat16)
NODES = Kind(True, False, torch.bfloat16)
FLAT_FP8 = Kind(False, True, torch.bfloat16)
NODES_FP8 = Kind(True, True, torch.bfloat16)
KINDS = [FLAT, NODES, Kind(True, False, torch.float32), FLAT_FP8, NODES_FP8]


@dataclass(frozen=True)
class Network:
    """Hosts, each a node with two ranks and two of the router's groups."""

    num_hosts: int

    @property
    def nodes(self) -> NodeMap:
        return NodeMap(node_of=tuple(r // RANKS_PER_HOST for r in range(self.num_ranks)))

    @property
    def num_ranks(self) -> int:
        return self.num_hosts * RANKS_PER_HOST

    @property
    def config(self) -> ModelConfig:
        groups = 2 * self.num_hosts
        return tiny_config(
            hidden_size=WIDTH,
            n_routed_experts=8 * groups,
            n_group=groups,
            topk_group=2,
            num_experts_per_tok=6,
        )

    def placement(self) -> ExpertPlacement:
        return contiguous_placement(self.config, self.num_ranks)

    def routing(self, rank: int) -> Routing:
        config = self.config
        generator = torch.Generator().manual_seed(rank)
        scores = torch.rand(200 + 7 * rank, config.n_routed_experts, generator=generator)
        experts = choose_experts(scores, config)
        gates = scores.gather(1, experts).requires_grad_()
        return Routing(experts_TK=experts, gates_TK=gates, scores_TE=scores)


def tcp_bytes(own_node: int) -> Counter[int]:
    """Payload that this process's connections have carried to each other node, once each."""
    sent: Counter[int] = Counter()
    for path in Path("/proc/self/fd").iterdir():
        if not path.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as connection:
            try:
                address = connection.getpeername()[0]
            except (OSError, IndexError):
                continue  # listens, or has no address
            if not isinstance(address, str) or "10.0.0." not in address:
                continue
            node = int(address.rsplit(".", 1)[1]) - 1
            if node != own_node:
                # tcpi_bytes_sent and tcpi_bytes_retrans of the kernel's struct tcp_info
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent_bytes, again = struct.unpack_from("QQ", info, 200)
                sent[node] += sent_bytes - again
    return sent


class Meter:
    """Reads all counters between two barriers, when nothing is under way."""

    def __init__(self, exchange: Exchange, ways: Ways, nodes: NodeMap, rank: int) -> None:
        self._exchange, self._ways, self._nodes, self._rank = exchange, ways, nodes, rank
        self._last = self._read()
        self._idle = self.since()

    def since(self) -> dict[str, Any]:
        """What has been sent since the last time: over TCP by node, by the interface, as noted."""
        tcp, interface, accounted = now = self._read()
        before_tcp, before_interface, before_accounted = self._last
        self._last = now
        tcp = {node: tcp[node] - before_tcp[node] for node in tcp}
        if hasattr(self, "_idle"):  # without what the barriers send
            tcp = {node: count - self._idle["tcp"][node] for node, count in tcp.items()}
        return {
            "tcp": tcp,
            "interface": interface - before_interface,
            "accounted": accounted - before_accounted,
        }

    def _read(self) -> tuple[Counter[int], int, int]:
        dist.barrier()
        found = (
            tcp_bytes(self._nodes.node_of[self._rank]),
            int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text()),
            self._nodes.across(self._rank, self._exchange.sent_bytes(self._ways)),
        )
        dist.barrier()
        return found


def measure(member: Member, network: Network) -> list[list[dict[str, Any]]]:
    """Of each kind of dispatch, in each phase, what this rank has sent."""
    member.join_world()
    ranks = range(network.num_ranks)
    ways = Ways(rows=dist.new_group(ranks), gradients=dist.new_group(ranks))
    found = []
    for kind in KINDS:
        exchange = Exchange()
        dispatch = make_dispatch(
            network.placement(),
            ways,
            CPU,
            exchange,
            nodes=network.nodes if kind.node_limited else None,
            fp8=kind.fp8,
        )
        routing = network.routing(member.rank)
        generator = torch.Generator().manual_seed(member.rank)
        x = torch.randn(len(routing.experts_TK), WIDTH, generator=generator).to(kind.dtype)
        x.requires_grad_()
        phases = []
        meter = Meter(exchange, ways, network.nodes, member.rank)
        dispatched = dispatch.dispatch(LAYER, x, routing)
        phases.append(meter.since())
        y = dispatched.rows_ND * 2
        y.register_hook(lambda _, found=phases, meter=meter: found.append(meter.since()))
        out = dispatch.combine(y, dispatched)
        phases.append(meter.since())
        out.sum().backward()
        phases.append(meter.since())
        found.append(phases)
    return found


def formula(network: Network, kind: Kind) -> list[CrossNodeBytes]:
    """Of each source."""
    config, placement = network.config, network.placement()
    rows = row_bytes(
        WIDTH,
        kind.dtype,
        config.num_experts_per_tok,
        config.n_routed_experts,
        node_limited=kind.node_limited,
        fp8=kind.fp8,
    )
    return [
        cross_node_bytes(
            network.routing(source).experts_TK,
            placement,
            LAYER,
            network.nodes,
            source,
            rows,
            node_limited=kind.node_limited,
        )
        for source in range(network.num_ranks)
    ]


def sent(of_sources: list[CrossNodeBytes], nodes: NodeMap, phase: str, here: int, to: int) -> int:
    """Bytes from node `here` to another: for its own sources, or back to the other's."""
    leaving = {"dispatch": "dispatch_n", "combine gradient": "combine_gradient_n"}
    if phase in leaving:
        sources = [of_sources[rank] for rank in nodes.ranks_on(here)]
        counts = sum(source.counts_n[to] for source in sources) if phase == "dispatch" else 0
        return counts + sum(getattr(source, leaving[phase])[to] for source in sources)
    name = {"combine": "combine_n", "dispatch gradient": "dispatch_gradient_n"}[phase]
    return sum(getattr(of_sources[rank], name)[here] for rank in nodes.ranks_on(to))


@pytest.mark.hosts
@pytest.mark.multiproc
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_what_crosses_the_wire_is_the_formula(num_hosts: int) -> None:
    if reason := can_emulate_hosts():
        pytest.skip(reason)
    network = Network(num_hosts)
    with emulated_hosts(num_hosts) as hosts:
        by_rank = run_ranks(measure, network, hosts.spread(network.num_ranks), timeout_s=200)
    totals: Counter[Kind] = Counter()
    for at, kind in enumerate(KINDS):
        of_sources = formula(network, kind)
        for number, phase in enumerate(PHASES):
            for host in range(num_hosts):
                ranks = [by_rank[r][at][number] for r in network.nodes.ranks_on(host)]
                others = [other for other in range(num_hosts) if other != host]
                predicted = {n: sent(of_sources, network.nodes, phase, host, n) for n in others}
                assert sum(rank["accounted"] for rank in ranks) == sum(predicted.values())
                for node, exact in predicted.items():
                    payload = sum(rank["tcp"][node] for rank in ranks)
                    totals[kind] += payload
                    # Each rank of one node sends to each of the other at most counts and rows.
                    most = 2 * RANKS_PER_HOST**2 * MESSAGE_BYTES
                    assert 0 <= payload - exact <= most < exact / 100, (kind, phase)
                # Headers of frames and acknowledgements come on top, and two barriers.
                total = sum(predicted.values())
                assert total < ranks[0]["interface"] < 1.05 * total + 20_000, (kind, phase)
    assert totals[NODES_FP8] < totals[NODES] < totals[FLAT_FP8] < totals[FLAT]


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_a_token_crosses_to_a_node_once_and_to_no_more_than_its_groups(num_hosts: int) -> None:
    network = Network(num_hosts)
    nodes, config = network.nodes, network.config
    one = RowBytes(dispatch=1, combine=1, combine_gradient=1, dispatch_gradient=1)
    for source in range(network.num_ranks):
        experts = network.routing(source).experts_TK
        node_TK = experts // (config.n_routed_experts // num_hosts)
        visited = [set(row) for row in node_TK.tolist()]
        assert max(map(len, visited)) <= config.topk_group
        rows = cross_node_bytes(
            experts, network.placement(), LAYER, nodes, source, one, node_limited=True
        )
        own = nodes.node_of[source]
        crossing = [sum(n in to for to in visited) if n != own else 0 for n in range(num_hosts)]
        assert rows.dispatch_n == rows.combine_n == crossing
