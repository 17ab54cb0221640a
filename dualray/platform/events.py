"""What a controller tells its clients, in order, from one thread to others."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dualray.platform.metrics import StepMetrics
from dualray.platform.states import RunState


@dataclass(frozen=True)
class Note:
    """Something a person should read; a warning if something is not as asked."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class StateChange:
    """The run entered `state`; `reason` says why it failed."""

    state: RunState
    reason: str = ""


Event = StepMetrics | Note | StateChange


class EventLog:
    """Append-only; readers remember how far they are and may wait for more."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._more = threading.Condition()

    def append(self, event: Event) -> None:
        with self._more:
            self._events.append(event)
            self._more.notify_all()

    def read(self, first: int, timeout_s: float) -> list[Event]:
        """Events from number `first` on; waits up to `timeout_s` for one if there is none."""
        with self._more:
            self._more.wait_for(lambda: len(self._events) > first, timeout_s)
            return self._events[first:]
