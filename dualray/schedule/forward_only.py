"""The same pipeline without backwards, for held-out loss."""

from __future__ import annotations

from dataclasses import replace

from dualray.schedule.actions import Action, Kind, Schedule


def forward_only(schedule: Schedule, num_micro_batches: int) -> Schedule:
    """Every micro-batch's forward over `schedule`'s stages, at the earliest beat it can run.

    Micro-batch i reaches stage s in beat i + s. Each rank orders its work by beat, then by
    direction; dependencies always lie in earlier beats, so no order of arrival deadlocks.
    """
    plain = replace(schedule, num_micro_batches=num_micro_batches)

    def steps(rank: int) -> tuple[Action, ...]:
        beats = [
            (index + schedule.stage_of[rank][direction], direction, index)
            for direction in range(schedule.num_directions)
            for index in range(plain.micro_batches_of(direction))
        ]
        return tuple(Action(Kind.FORWARD, direction, i) for _, direction, i in sorted(beats))

    return replace(plain, steps=tuple(steps(rank) for rank in range(schedule.num_ranks)))
