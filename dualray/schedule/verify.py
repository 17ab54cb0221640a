"""Proof that a schedule can be executed and computes the whole gradient.

The execution model is the executor's: a rank walks its steps in order; before a step it
waits for the receives that the step needs; after a step it sends, and sends are buffered.
Messages travel in channels, one per (forward or backward, direction) and pair of ranks, and
a channel is first in, first out, so sender and receiver must agree on the order of
micro-batches. `blocking` proves the same without buffers. The rules are checked in the order
of this file; the first broken one is raised as a `ScheduleError`, which means a bug in a
generator and never a user's mistake.
"""

from __future__ import annotations

from collections import Counter, deque

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step, flatten
from dualray.schedule.blocking import check_blocking
from dualray.schedule.exchanges import Exchanges, Message, ScheduleError, halves, in_order
from dualray.schedule.memory import Peaks, peaks_of


def verify(schedule: Schedule) -> Peaks:
    """Raises ScheduleError on the first broken rule; returns the memory the schedule needs."""
    for rank in range(schedule.num_ranks):
        _check_complete(schedule, rank)
        _check_local_order(schedule, rank)
    _check_channels(schedule)
    exchanges = Exchanges(schedule)
    _check_turn(schedule, exchanges)
    for _ in in_order(schedule, exchanges.takes, exchanges.makes):
        pass
    check_blocking(schedule)
    return _check_memory(schedule)


def _check_complete(schedule: Schedule, rank: int) -> None:
    count = Counter(flatten(schedule.steps[rank]))
    for action, times in count.items():
        if action.direction >= schedule.num_directions or not (
            0 <= action.micro_batch < schedule.micro_batches_of(action.direction)
        ):
            raise ScheduleError(f"rank {rank} runs {_name(action)}, which does not exist")
        if times > 1:
            raise ScheduleError(f"rank {rank} runs {_name(action)} {times} times")
    for direction in range(schedule.num_directions):
        for micro_batch in range(schedule.micro_batches_of(direction)):
            runs = {kind: count[Action(kind, direction, micro_batch)] for kind in Kind}
            at = f"{direction}.{micro_batch}"
            if not runs[Kind.FORWARD]:
                raise ScheduleError(f"rank {rank} never runs F{at}")
            full, split = runs[Kind.BACKWARD], runs[Kind.INPUT_GRAD]
            if not full and not split:
                raise ScheduleError(f"rank {rank} never runs B{at} or I{at}")
            if full and split:
                raise ScheduleError(f"rank {rank} runs both B{at} and I{at}")
            if split and not runs[Kind.WEIGHT_GRAD]:
                raise ScheduleError(f"rank {rank} runs I{at} and never its W")
            if full and runs[Kind.WEIGHT_GRAD]:
                raise ScheduleError(f"rank {rank} runs B{at} and also a W for it")


def _check_local_order(schedule: Schedule, rank: int) -> None:
    live: set[tuple[int, int]] = set()
    queued: deque[tuple[int, int]] = deque()
    for index, step in enumerate(schedule.steps[rank]):
        if isinstance(step, Overlap) and not (
            step.forward.kind is Kind.FORWARD
            and step.backward.kind in (Kind.BACKWARD, Kind.INPUT_GRAD)
            and _micro_batch(step.forward) != _micro_batch(step.backward)
        ):
            raise ScheduleError(
                f"rank {rank} step {index}: {step} does not pair a forward with "
                "another micro-batch's backward"
            )
        for action in halves(step):
            at = _micro_batch(action)
            if action.kind is Kind.FORWARD:
                live.add(at)
            elif action.kind is Kind.WEIGHT_GRAD:
                if not queued or queued[0] != at:
                    raise ScheduleError(
                        f"rank {rank} step {index}: {_name(action)}, but "
                        + (f"the oldest is {_text('W', queued[0])}" if queued else "none is queued")
                    )
                queued.popleft()
            else:
                if at not in live:
                    raise ScheduleError(f"rank {rank} step {index}: {action} before its forward")
                live.remove(at)
                if action.kind is Kind.INPUT_GRAD:
                    queued.append(at)


def _check_channels(schedule: Schedule) -> None:
    for direction in range(schedule.num_directions):
        for rank in range(schedule.num_ranks):
            for forward, peer in (
                (True, schedule.downstream(rank, direction)),
                (False, schedule.upstream(rank, direction)),
            ):
                if peer is None or peer[0] == rank:
                    continue
                sent = _order(schedule.steps[rank], forward, direction)
                taken = _order(schedule.steps[peer[0]], forward, peer[1])
                if sent != taken:
                    at = next(i for i, (a, b) in enumerate(zip(sent, taken)) if a != b)
                    raise ScheduleError(
                        f"channel {'F' if forward else 'B'}{direction} from rank {rank} to rank "
                        f"{peer[0]}: message {at} is micro-batch {sent[at]}, expected {taken[at]}"
                    )


def _order(steps: tuple[Step, ...], forward: bool, direction: int) -> list[int]:
    return [
        action.micro_batch
        for action in flatten(steps)
        if action.direction == direction
        and action.kind is not Kind.WEIGHT_GRAD
        and (action.kind is Kind.FORWARD) == forward
    ]


def _check_turn(schedule: Schedule, exchanges: Exchanges) -> None:
    """Where a V turns, what one leg takes is what the other has made in an earlier step."""
    for rank, steps in enumerate(schedule.steps):
        made: set[Message] = set()
        for index, step in enumerate(steps):
            for message in exchanges.takes[rank][index]:
                forward, maker, direction, micro_batch = message
                if maker == rank and message not in made:
                    text = _text("F" if forward else "B", (direction, micro_batch))
                    raise ScheduleError(
                        f"rank {rank} step {index}: {step} before {text}, which hands over to it"
                    )
            made.update(exchanges.makes[rank][index])


def _check_memory(schedule: Schedule) -> Peaks:
    peaks = peaks_of(schedule.steps)
    for what, found, promised in (
        ("live micro-batches", peaks.activations, schedule.max_activations),
        ("queued weight gradients", peaks.deferred, schedule.max_deferred),
    ):
        for rank, (count, limit) in enumerate(zip(found, promised)):
            if count > limit:
                raise ScheduleError(f"rank {rank} holds {count} {what} and promised {limit}")
    return peaks


def _micro_batch(action: Action) -> tuple[int, int]:
    return action.direction, action.micro_batch


def _text(kind: str, at: tuple[int, int]) -> str:
    return f"{kind}{at[0]}.{at[1]}"


def _name(action: Action) -> str:
    return _text(action.kind.value, _micro_batch(action))
