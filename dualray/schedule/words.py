"""The words that the drawings of a schedule share."""

from __future__ import annotations

from dualray.schedule.actions import Kind, Overlap, Schedule, flatten

KIND_WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "input gradient",
    Kind.WEIGHT_GRAD: "weight gradient",
}


def kinds_of(schedule: Schedule) -> tuple[Kind, ...]:
    """The kinds of work that the schedule has, in the order of `Kind`."""
    found = {action.kind for steps in schedule.steps for action in flatten(steps)}
    return tuple(kind for kind in Kind if kind in found)


def has_pairs(schedule: Schedule) -> bool:
    return any(isinstance(step, Overlap) for steps in schedule.steps for step in steps)


def direction_words(schedule: Schedule) -> tuple[str, ...]:
    """What each direction is called; empty when there is only one."""
    if schedule.num_directions == 1:
        return ()
    if len(schedule.entries) == 1:
        return ("first leg", "second leg")
    return ("direction 0", "direction 1")
