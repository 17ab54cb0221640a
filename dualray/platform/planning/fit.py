"""Everything about a layout that needs no simulation: its memory, its stages' costs, a bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dualray.platform.planning.holding import (
    Copies,
    Held,
    copies,
    held_by_stage,
    optimizer_seconds,
    reduction_seconds,
)
from dualray.platform.planning.memory import Memory, memory_by_rank
from dualray.platform.planning.setting import Candidate, Setting
from dualray.platform.planning.stages import Duration, Parts
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout before it is simulated."""

    candidate: Candidate
    memory: Memory
    """Of the fullest GPU."""
    fullest: int
    """The pipeline rank of that GPU."""
    held: tuple[Held, ...]
    """Parameters of each stage."""
    copies: Copies
    """How many workers hold the same ones."""
    stages: tuple[Duration, ...]
    """Of one micro-batch in each stage."""
    hand_over_s: float
    """An activation on its way to the next stage."""
    updated: Held
    """Parameters of the pipeline rank whose optimizer takes longest."""
    optimizer_s: float
    """From the last backward to the next forward."""
    reduction_s: float
    """Of it, sending gradients and weights."""
    shortest_s: float
    """No step is shorter: the busiest rank's work and the optimizer's."""

    def is_within(self, setting: Setting) -> bool:
        """Whether the fullest GPU's memory holds it."""
        return self.memory.total <= setting.cluster.hardware.memory_bytes

    @property
    def stage_costs(self) -> tuple[Costs, ...]:
        """As the simulator takes them."""
        return tuple(stage.costs(self.hand_over_s) for stage in self.stages)


def make_fit(setting: Setting, candidate: Candidate, parts: Parts) -> Fit:
    """Puts a layout's figures together."""
    hardware, precision = setting.cluster.hardware, setting.precision
    schedule = outline(candidate.schedule, candidate.pipeline)
    held = held_by_stage(setting.model, candidate, schedule)
    shared = copies(candidate, schedule)
    memories = memory_by_rank(setting, candidate, schedule, held, shared)
    by_rank = [sum((held[stage] for stage in each), start=Held()) for each in schedule.stage_of]
    stages = parts.stages(setting.model, candidate.layers_per_stage)
    hand_over_s = hand_over_seconds(setting, candidate)
    shortest = [
        min(cost.overlapped, cost.forward + cost.backward)
        for cost in (stage.costs(hand_over_s) for stage in stages)
    ]
    slowest = max(
        by_rank,
        key=lambda each: optimizer_seconds(each, shared, candidate, hardware, precision),
    )
    optimizer_s = optimizer_seconds(slowest, shared, candidate, hardware, precision)
    fullest = max(range(len(memories)), key=lambda rank: memories[rank].total)
    return Fit(
        candidate=candidate,
        memory=memories[fullest],
        fullest=fullest,
        held=tuple(held),
        copies=shared,
        stages=tuple(stages),
        hand_over_s=hand_over_s,
        optimizer_s=optimizer_s,
        updated=slowest,
        reduction_s=reduction_seconds(slowest, shared, candidate, hardware, precision),
        shortest_s=optimizer_s
        + candidate.micro_batches
        / len(schedule.entries)
        * max(sum(shortest[stage] for stage in each) for each in schedule.stage_of),
    )


@cache
def outline(kind: str, num_ranks: int) -> Schedule:
    """A short schedule, whose stages and ranks are those of a long one."""
    return make_schedule(kind, num_ranks, 2 * num_ranks)


def hand_over_seconds(setting: Setting, candidate: Candidate) -> float:
    """Seconds of an activation's way to the next stage: over NVLink if one node has them all."""
    hardware = setting.cluster.hardware
    local = candidate.experts * candidate.pipeline <= hardware.gpus_per_node
    rate = hardware.nvlink_bytes_per_s if local else hardware.network_bytes_per_s
    tokens = candidate.batch(setting.seq_len).num_tokens
    return tokens * setting.model.hidden_size * setting.precision.activation_bytes / rate
