"""A pipeline schedule as plain data: what each rank does, in order.

Nothing here knows tensors or processes. The same object is verified, simulated, drawn
and walked by the executor.

Directions are absolute: direction 0 runs down the ranks from rank 0, direction 1 up from
rank P-1. Under DualPipe each is a stream of its own micro-batches; under DualPipeV they are
the two legs of a V that every micro-batch walks one after the other, and the last rank hands
it from the first leg to the second without a message. Other schedules only use direction 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


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

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The directions in which micro-batches enter, ascending."""
        return tuple(sorted({self.entry_of(d) for d in range(self.num_directions)}))

    def entry_of(self, direction: int) -> int:
        """The direction in which the micro-batches that pass through `direction` enter.

        A leg that follows another one has the entry of the first; else a direction is its own.
        """
        return self.position_of(direction, 0)[1]

    def micro_batches_of(self, direction: int) -> int:
        """How many micro-batches pass through this direction.

        Of two streams the first half enters in direction 0 and the rest in 1; all legs of one
        stream carry every micro-batch.
        """
        if len(self.entries) == 1:
            return self.num_micro_batches
        half = self.num_micro_batches // 2
        return half if direction == 0 else self.num_micro_batches - half

    def position_of(self, direction: int, stage: int) -> tuple[int, int]:
        """(rank, direction) at which the micro-batches of `direction` pass through `stage`.

        That direction is another one where `stage` lies on another leg of their way.
        """
        return self._positions[direction][stage]

    @cached_property
    def _positions(self) -> tuple[dict[int, tuple[int, int]], ...]:
        legs: list[dict[int, tuple[int, int]]] = [
            {stages[direction]: (rank, direction) for rank, stages in enumerate(self.stage_of)}
            for direction in range(self.num_directions)
        ]
        anywhere = {stage: at for leg in reversed(legs) for stage, at in leg.items()}
        return tuple(anywhere | leg for leg in legs)

    def upstream(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) whose forward output this position consumes; None at the entry.

        Its rank is `rank` itself where a V turns: a local hand-over, no message.
        """
        stage = self.stage_of[rank][direction]
        return None if stage == 0 else self.position_of(direction, stage - 1)

    def downstream(self, rank: int, direction: int) -> tuple[int, int] | None:
        """(rank, direction) that consumes this position's forward output; None at the loss.

        Its rank is `rank` itself where a V turns: a local hand-over, no message.
        """
        stage = self.stage_of[rank][direction]
        return None if stage == self.num_stages - 1 else self.position_of(direction, stage + 1)
