"""What each rank of the schedule benchmark does: measures costs, then walks every schedule.

The schedules take their steps in turn, so that a machine that slows down slows all. They share
the process groups of one `join`: dualpipe's channels are a superset of the others'.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dualray.parallel.groups import join, leave
from dualray.parallel.layout import Layout
from dualray.parallel.micro_batch import StepSums
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.spans import COMPUTE
from dualray.platform.bench.ranks import Member
from dualray.platform.bench.schedule_costs import Measured, measure_costs, measure_exchange
from dualray.platform.bench.sleeping_stage import Clock, LayerDurations
from dualray.platform.bench.sleeping_worker import SleepingWorker
from dualray.schedule.actions import Schedule
from dualray.schedule.make import KINDS, make_schedule

LAYERS_PER_RANK = 2
"""Of the one model that all schedules cut: a stage a rank, or under dualpipev two halves."""
_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the ranks are given."""

    num_micro_batches: int
    layer: LayerDurations
    warm_up_steps: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One step of one rank."""

    elapsed_s: float
    busy_s: float
    """Of it, in actions."""
    loss: float
    """For every micro-batch that ends on this rank the stages that it has passed through."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one rank has measured; `costs` by layers of a stage, on rank 0 alone."""

    costs: dict[int, Measured]
    exchange_s: float
    walks: dict[str, list[Walk]]


def layers_of_stage(schedule: Schedule) -> int:
    return LAYERS_PER_RANK * schedule.num_ranks // schedule.num_stages


def run(member: Member, task: Task) -> Found:
    """For `run_ranks`."""
    _sleep_precisely()
    schedules = {
        kind: make_schedule(kind, member.world_size, task.num_micro_batches) for kind in KINDS
    }
    groups = join(
        Layout(pipeline=member.world_size, schedule="dualpipe"),
        schedules["dualpipe"],
        member.rank,
        member.rendezvous,
        device=torch.device("cpu"),
        hosted=member.hosted,
    )
    links = PipelineLinks(groups.channels, groups.pipeline_ranks)
    clock = Clock()
    costs = {}
    if member.rank == 0:
        for num_layers in sorted({layers_of_stage(schedule) for schedule in schedules.values()}):
            costs[num_layers] = measure_costs(task.layer, num_layers, clock)
    dist.barrier(groups.world)
    exchange_s = measure_exchange(member.rank, links) if member.rank < 2 else 0.0
    workers = {
        kind: SleepingWorker(
            schedule, member.rank, links, task.layer, layers_of_stage(schedule), clock
        )
        for kind, schedule in schedules.items()
    }
    walks: dict[str, list[Walk]] = {kind: [] for kind in KINDS}
    for _ in range(task.warm_up_steps + task.steps):
        for kind, worker in workers.items():
            dist.barrier(groups.world)
            walks[kind].append(_walk(worker.step()))
    for worker in workers.values():
        worker.close()
    dist.barrier(groups.world)
    leave()
    measured = {kind: taken[task.warm_up_steps :] for kind, taken in walks.items()}
    return Found(costs=costs, exchange_s=exchange_s, walks=measured)


def _walk(sums: StepSums) -> Walk:
    busy_s = sum(end - begin for _, category, begin, end in sums.spans.taken if category == COMPUTE)
    return Walk(elapsed_s=sums.elapsed_s, busy_s=busy_s, loss=sums.main)


def _sleep_precisely() -> None:
    """The kernel may wake a sleeper 50 us late to save power; let this thread ask for 1 ns.

    Threads that it starts ask for the same.
    """
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)
