"""The life of a run, as explicit states."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    STARTING = "starting"
    TRAINING = "training"
    SWITCHING = "switching"
    SERVING = "serving"
    PAUSED = "paused"
    """The workers neither train nor serve."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (RunState.STOPPED, RunState.FAILED)


_NEXT = {
    RunState.STARTING: {RunState.TRAINING, RunState.SWITCHING},
    RunState.TRAINING: {RunState.SWITCHING},
    RunState.SWITCHING: {RunState.SERVING, RunState.TRAINING, RunState.PAUSED},
    RunState.SERVING: {RunState.SWITCHING},
    RunState.PAUSED: {RunState.SWITCHING},
    RunState.STOPPING: {RunState.STOPPED},
    RunState.STOPPED: set(),
    RunState.FAILED: set(),
}


def check_transition(current: RunState, new: RunState) -> None:
    """Raises ValueError on a transition that the life of a run does not have.

    Every state that is not final may be stopped or fail.
    """
    if current.is_final or (
        new not in _NEXT[current] and new not in (RunState.STOPPING, RunState.FAILED)
    ):
        raise ValueError(f"a run that is {current} cannot become {new}")
