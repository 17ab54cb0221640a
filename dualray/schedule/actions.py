"""A pipeline schedule as plain data: what each rank does, in order.

Nothing here knows tensors or processes. The same object is verified, simulated, drawn
and walked by the executor.

Directions are absolute: direction 0 enters the pipeline at rank 0, direction 1 at rank
P-1 (DualPipe's mirrored stream; under DualPipeV the second leg of the V). Schedules that
feed from one end only use direction 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"
    """Full backward: input gradient and weight gradient at once."""
    INPUT_GRAD = "I"
    """Input gradient only; the weight gradient is queued."""
    WEIGHT_GRAD = "W"
    """Runs the oldest queued weight gradient of the rank."""


@dataclass(frozen=True, slots=True)
class Action:
    """One unit of work of one rank on one micro-batch.

    A `WEIGHT_GRAD` carries the direction and micro-batch whose gradient it completes,
    which the executor may assert; its text is a bare `W`.
    """

    kind: Kind
    direction: int
    micro_batch: int

    def __str__(self) -> str:
        if self.kind is Kind.WEIGHT_GRAD:
            return "W"
        return f"{self.kind.value}{self.direction}.{self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and another micro-batch's backward that may be interleaved."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"


Step = Action | Overlap


def flatten(steps: tuple[Step, ...]) -> Iterator[Action]:
    """The actions of one rank with each overlapped pair as its forward, then its backward."""
    for step in steps:
        if isinstance(step, Overlap):
            yield step.forward
            yield step.backward
        else:
            yield step


@dataclass(frozen=True)
class Schedule:
    """The whole pipeline's plan for one optimizer step.

    `steps[rank]` is the ordered work of that rank. `stage_of[rank][direction]` is the stage
    that rank applies to micro-batches of that direction; `upstream` and `downstream` give
    the neighbours along a micro-batch's way, so callers never compute ranks themselves.
    `max_activations[rank]` and `max_deferred[rank]` are the memory the generator promises
    (live micro-batches, queued weight gradients); `verify` holds it to them. Empty: no promise.
    """

    kind: str
    num_ranks: int
    num_stages: int
    num_micro_batches: int
    steps: tuple[tuple[Step, ...], ...]
    stage_of: tuple[tuple[int, ...], ...]
    max_activations: tuple[int, ...] = ()
    max_deferred: tuple[int, ...] = ()

    @property
    def num_directions(self) -> int:
        return len(self.stage_of[0])

    def micro_batches_of(self, direction: int) -> int:
        """How many micro-batches enter in this direction: the first half in 0, the rest in 1."""
        if self.num_directions == 1:
            return self.num_micro_batches
        half = self.num_micro_batches // 2
        return half if direction == 0 else self.num_micro_batches - half

    def rank_of(self, direction: int, stage: int) -> int:
        """Which rank applies `stage` to micro-batches of `direction`."""
        for rank, stages in enumerate(self.stage_of):
            if stages[direction] == stage:
                return rank
        raise ValueError(f"direction {direction} never visits stage {stage}")

    def upstream(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) whose forward output this position consumes; None at the entry."""
        stage = self.stage_of[rank][direction]
        return None if stage == 0 else (self.rank_of(direction, stage - 1), direction)

    def downstream(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) that consumes this position's forward output; None at the loss."""
        stage = self.stage_of[rank][direction]
        if stage == self.num_stages - 1:
            return None
        return (self.rank_of(direction, stage + 1), direction)
