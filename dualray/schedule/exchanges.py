"""Which steps wait for which: the edges between the ranks' lists of steps.

A forward hands its output to the next stage and a backward its gradient to the one before.
Each hand-over is a message, named by the action that makes it; it has one maker and one
taker. Where a V turns both are the same rank and nothing is sent, but the order still holds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step

Message = tuple[bool, int, int, int]
"""(is forward, rank, direction, micro-batch) of the action that makes it."""

_Event = TypeVar("_Event", bound=Hashable)


class ScheduleError(AssertionError):
    """A schedule breaks a rule; the message names rank, step and action."""


def halves(step: Step) -> tuple[Action, ...]:
    """The one or two actions of a step."""
    return (step.forward, step.backward) if isinstance(step, Overlap) else (step,)


class Exchanges:
    """The messages that every step of a schedule takes and makes.

    `takes[rank][index]` and `makes[rank][index]` are those of step `index`. A message to the
    same rank is among them; what reaches nobody (a loss, an embedding's gradient) is not. A W
    has none, and a rank's own forward before its backward is its list's order, not a message.
    """

    def __init__(self, schedule: Schedule) -> None:
        directions = range(schedule.num_directions)
        self.takes: list[list[list[Message]]] = []
        self.makes: list[list[list[Message]]] = []
        for rank, steps in enumerate(schedule.steps):
            before = [schedule.upstream(rank, direction) for direction in directions]
            after = [schedule.downstream(rank, direction) for direction in directions]
            takes: list[list[Message]] = []
            makes: list[list[Message]] = []
            for step in steps:
                taken: list[Message] = []
                made: list[Message] = []
                for action in halves(step):
                    kind, direction = action.kind, action.direction
                    if kind is Kind.WEIGHT_GRAD:
                        continue
                    forward = kind is Kind.FORWARD
                    source, sink = before[direction], after[direction]
                    if not forward:
                        source, sink = sink, source
                    if source is not None:
                        taken.append((forward, source[0], source[1], action.micro_batch))
                    if sink is not None:
                        made.append((forward, rank, direction, action.micro_batch))
                takes.append(taken)
                makes.append(made)
            self.takes.append(takes)
            self.makes.append(makes)


def in_order(
    schedule: Schedule,
    needs: Sequence[Sequence[Sequence[_Event]]],
    gives: Sequence[Sequence[Sequence[_Event]]],
) -> Iterator[tuple[int, int]]:
    """Yields (rank, index) of every step so that `needs` come after the steps that `gives` them.

    An event is given once and needed by at most one rank. Raises ScheduleError with the step
    that each rank is stuck at when none can go on.
    """
    given: set[_Event] = set()
    waits: dict[_Event, int] = {}
    position = [0] * schedule.num_ranks
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        index, end = position[rank], len(schedule.steps[rank])
        while index < end:
            missing = next((event for event in needs[rank][index] if event not in given), None)
            if missing is not None:
                waits[missing] = rank
                break
            yield rank, index
            for event in gives[rank][index]:
                given.add(event)
                if event in waits:
                    ready.append(waits.pop(event))
            index += 1
        position[rank] = index
    stuck = [
        f"rank {rank} at step {position[rank]} ({steps[position[rank]]})"
        for rank, steps in enumerate(schedule.steps)
        if position[rank] < len(steps)
    ]
    if stuck:
        raise ScheduleError(f"deadlock: {', '.join(stuck)} wait for each other")
