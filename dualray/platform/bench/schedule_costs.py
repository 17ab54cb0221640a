"""What the simulation is told: costs and latency, measured without any pipeline.

One worker walks a plan of its own through the real executor, and two pass a message to and fro. So
a simulation knows what each kind of step takes by itself and nothing of how steps wait for
each other: that is what it predicts.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch

from dualray.parallel.groups import FORWARD
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.spans import COMPUTE
from dualray.platform.bench.sleeping_stage import Clock, LayerDurations, SleepingStages
from dualray.platform.bench.sleeping_worker import SleepingWorker
from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step
from dualray.schedule.simulate import Costs

_REPEATS = 7
_ROUND_TRIPS = 60


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Seconds of each kind of step of one stage."""

    costs: Costs
    backward_s: float
    """B by itself, which the costs take to be I + W."""


def plan(repeats: int) -> Schedule:
    """One rank with one stage that does everything `repeats` times: pairs, F, B, I and W."""
    forwards = [Action(Kind.FORWARD, 0, m) for m in range(3 * repeats + 1)]
    backwards = [Action(Kind.BACKWARD, 0, m) for m in range(2 * repeats + 1)]
    steps: list[Step] = [forwards[0]]
    steps += [Overlap(forwards[m + 1], backwards[m]) for m in range(repeats)]
    steps.append(backwards[repeats])
    for m in range(repeats + 1, 2 * repeats + 1):
        steps += [forwards[m], backwards[m]]
    for m in range(2 * repeats + 1, 3 * repeats + 1):
        steps += [forwards[m], Action(Kind.INPUT_GRAD, 0, m), Action(Kind.WEIGHT_GRAD, 0, m)]
    return Schedule(
        kind="costs",
        num_ranks=1,
        num_stages=1,
        num_micro_batches=3 * repeats + 1,
        steps=(tuple(steps),),
        stage_of=((0,),),
    )


def measure_costs(layer: LayerDurations, num_layers: int, clock: Clock) -> Measured:
    """Medians of the time from the beginning of a step to that of the next one."""
    schedule = plan(_REPEATS)
    worker = SleepingWorker(schedule, 0, PipelineLinks({}, (0,)), layer, num_layers, clock)
    sums = worker.step()
    worker.close()
    begins = [start for _, category, start, _ in sums.spans.taken if category == COMPUTE]
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for step, (begin, end) in zip(schedule.steps[0], pairwise(begins)):
        seconds["F&B" if isinstance(step, Overlap) else step.kind.value].append(end - begin)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    costs = Costs(
        forward=median["F"],
        input_grad=median["I"],
        weight_grad=median["W"],
        overlapped=median["F&B"],
    )
    return Measured(costs=costs, backward_s=median["B"])


def measure_exchange(rank: int, links: PipelineLinks) -> float:
    """Seconds of a message between pipeline ranks 0 and 1, which both call this: the median."""
    shape = (1, SleepingStages.hidden_size)
    message = torch.zeros(shape)
    halves = []
    for _ in range(_ROUND_TRIPS):
        incoming = links.post(FORWARD, 0, shape, message.dtype, message.device, 1 - rank)
        begin = time.perf_counter()
        if rank == 0:
            links.send(FORWARD, 0, message, 1)
        links.wait(incoming)
        if rank == 1:
            links.send(FORWARD, 0, message, 0)
        halves.append((time.perf_counter() - begin) / 2)
    links.drain()
    return statistics.median(halves)
