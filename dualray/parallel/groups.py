"""Process groups of one worker: who it exchanges what with.

A group is issued by one thread at a time, in the schedule's order; traffic that has its own
order has its own group. Groups are formed anew by every `join` and cached nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from dualray.parallel.layout import Coordinate, Layout, dense_ranks, expert_ranks
from dualray.schedule.actions import Schedule

Group = dist.ProcessGroup
FORWARD, BACKWARD = "F", "B"


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the workers of one generation meet."""

    host: str
    port: int
    timeout_s: float = 120.0
    """How long a collective may wait for a peer before the run is declared broken."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Two groups of the same ranks: what forwards send, and what backwards do, keep apart."""

    rows: Group
    gradients: Group


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of one worker.

    `channels[kind, direction]` carries activations (F) or gradients (B) of one direction
    along the pipeline: messages between two ranks on a channel flow one way, in order of
    micro-batches, so a sender can never wait for a receiver that waits for it.
    `dispatch[direction]` joins the expert ranks of a stage: a forward and the backward of
    another micro-batch may be under way in one direction. `dense` holds every copy of the
    worker's dense parameters, `expert` every copy of its routed experts, `embedding` (only
    where the last stage has its own copy) every copy of the embedding.
    """

    world: Group
    channels: dict[tuple[str, int], Group]
    pipeline_ranks: tuple[int, ...]
    dispatch: tuple[Ways, ...]
    dense: Group
    dense_ranks: tuple[int, ...]
    expert: Group
    expert_ranks: tuple[int, ...]
    embedding: Group | None
    embedding_ranks: tuple[int, ...]


def host_rendezvous(host: str) -> tuple[dist.TCPStore, Rendezvous]:
    """Open a meeting place on a port that the system chooses, for rank 0 to announce.

    Whoever hosts keeps the store; a port that is looked up first and bound later may be
    taken in between.
    """
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, Rendezvous(host=host, port=store.port)


def join(
    layout: Layout,
    schedule: Schedule,
    rank: int,
    rendezvous: Rendezvous,
    *,
    device: torch.device,
    hosted: dist.TCPStore | None = None,
) -> Groups:
    """Meet the other workers and form this worker's groups; leaves former ones first.

    Every worker of the layout must call it with equal arguments except `rank` and `hosted`,
    which is the store of the one that hosts the rendezvous; without it rank 0 opens the
    port. Tensors are exchanged on `device`: NCCL between GPUs, gloo between CPUs.
    """
    leave()
    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = hosted or dist.TCPStore(
        rendezvous.host,
        rendezvous.port,
        is_master=rank == 0,
        wait_for_workers=False,
        timeout=timeout,
    )
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=layout.world_size,
        timeout=timeout,
    )

    def group(ranks: tuple[int, ...]) -> Group:
        # Members alone form a group; several groups of the same ranks stay distinct.
        made = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        assert isinstance(made, Group)
        return made

    at = layout.coordinate(rank)
    pipeline = tuple(
        layout.rank(Coordinate(replica=at.replica, pipeline=p, expert=at.expert))
        for p in range(layout.pipeline)
    )
    siblings = tuple(
        layout.rank(Coordinate(replica=at.replica, pipeline=at.pipeline, expert=e))
        for e in range(layout.experts)
    )
    directions = range(schedule.num_directions)
    stage = schedule.stage_of[at.pipeline][0]
    dense = dense_ranks(layout, schedule, stage)
    experts = expert_ranks(layout, schedule, stage, at.expert)
    ends = embedding_ranks(layout, schedule)
    assert dist.group.WORLD is not None
    return Groups(
        world=dist.group.WORLD,
        channels={(k, d): group(pipeline) for k in (FORWARD, BACKWARD) for d in directions},
        pipeline_ranks=pipeline,
        dispatch=tuple(Ways(rows=group(siblings), gradients=group(siblings)) for _ in directions),
        dense=group(dense),
        dense_ranks=dense,
        expert=group(experts),
        expert_ranks=experts,
        embedding=group(ends) if rank in ends and ends != dense else None,
        embedding_ranks=ends,
    )


def embedding_ranks(layout: Layout, schedule: Schedule) -> tuple[int, ...]:
    """World ranks at either end of the pipeline: those that can hold the embedding."""
    ends = dense_ranks(layout, schedule, 0) + dense_ranks(layout, schedule, schedule.num_stages - 1)
    return tuple(sorted(set(ends)))


def leave() -> None:
    """Destroy all process groups of this process, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()
