"""Following a run that this process started: its events, Ctrl-C, and what it must not leave."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from dualray.actors.cluster import NAMESPACE, Connection, answers
from dualray.checkpoint.store import steps
from dualray.errors import RunError
from dualray.platform.console import Console
from dualray.platform.events import Event, Note, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.metrics import StepMetrics
from dualray.platform.states import RunState

# A closed terminal (SIGHUP) is no reason to lose the steps since the last checkpoint.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S = 0.5
_ANSWER_WITHIN_S = 2.0
_LOOK_EVERY_S = 5.0
_UNANSWERED = 5
"""Looks for a silent head, a second apart, before it is given up: 10 s if it refuses, 35 s if it
is cut off. Actors may answer without it, but Ray ends this whole process after 60 s, without an
exception."""


class Interrupts:
    """How many of `_SIGNALS` have come.

    Before there is a run to stop, a signal interrupts whatever is going on. Only the main thread
    hears signals.
    """

    def __init__(self) -> None:
        self.count = 0
        self._counts = False

    def listen(self, *, count: bool) -> None:
        """Takes the signals; `count` from when on there is a run to stop."""
        self._counts = count
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._take)

    def _take(self, signum: int, frame: Any) -> None:
        self.count += 1  # also where an interrupt might get lost in foreign code
        if not self._counts:
            raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Interrupts]:
    """No signal of `_SIGNALS` ends this process inside."""
    old = {number: signal.getsignal(number) for number in _SIGNALS}
    received = Interrupts()
    received.listen(count=False)
    try:
        yield received
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in old.items():
                signal.signal(number, handler)


class Following:
    """What this process holds of a run: its controller, its reservation, its way into Ray."""

    def __init__(
        self, folder: RunFolder, connection: Connection, controller: Any, group: PlacementGroup
    ) -> None:
        self.controller = controller
        self._folder = folder
        self._connection = connection
        self._group = group
        self._unanswered = 0
        self._next_look = time.monotonic() + _LOOK_EVERY_S

    def follow(self, console: Console, received: Interrupts) -> None:
        """Show events until the run has ended. Raises RunError with the reason if it fails."""
        seen = told = 0
        while True:
            if received.count > told:
                told = received.count
                if told > 1:
                    raise RunError("the run was ended without waiting", hint="resume with --resume")
                console.note(
                    "stopping after this step and accepted requests; once more to end at once"
                )
                self.controller.stop.remote()
            events = self._new_events(seen)
            seen += len(events)
            for event in events:
                if isinstance(event, StepMetrics):
                    console.step(event)
                elif isinstance(event, Note):
                    (console.warn if event.warning else console.note)(event.text)
                elif event.state is RunState.FAILED:
                    sentence, _, hint = event.reason.rstrip(".").rpartition("; ")
                    raise RunError(sentence or hint, hint=hint if sentence else "see the log")
                elif isinstance(event, StateChange) and event.state.is_final:
                    return

    def end(self) -> None:
        """Leave nothing of the run behind, however it ended."""
        if not self._connection.embedded and not self._unanswered:
            # Workers end with their controller; what is detached would stay in the cluster.
            engine = named_actor(f"{self._folder.path.name}.engine")
            for actor in (self.controller, engine):
                if actor is not None:
                    ray.kill(actor)
            remove_placement_group(self._group)
        self._connection.close()

    def _new_events(self, first: int) -> list[Event]:
        """Events from number `first` on, none after a while. Raises RunError if nobody tells."""
        self._look_for_head()
        try:
            return ray.get(
                self.controller.poll.remote(first, _POLL_S), timeout=_POLL_S + _ANSWER_WITHIN_S
            )
        except GetTimeoutError:
            return []
        except ActorUnavailableError:  # for now; Ray says so at once
            time.sleep(_POLL_S)
            return []
        except RayActorError:
            raise self._lost(f"the controller of run {self._folder.path.name} died") from None

    def _look_for_head(self) -> None:
        if time.monotonic() < self._next_look:
            return
        address = self._connection.address
        self._unanswered = 0 if answers(address) else self._unanswered + 1
        if self._unanswered == _UNANSWERED:
            self._connection.kill()
            raise self._lost(f"the Ray head at {address} is gone")
        self._next_look = time.monotonic() + (1.0 if self._unanswered else _LOOK_EVERY_S)

    def _lost(self, sentence: str) -> RunError:
        committed = steps(self._folder.checkpoints)
        if not committed:
            return RunError(f"{sentence}; no checkpoint was committed", hint="start the run again")
        return RunError(
            f"{sentence}; the last committed checkpoint is {committed[0][1]}",
            hint="continue from it with --resume",
        )


def named_actor(name: str) -> Any:
    """The detached actor of that name, None if there is none."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
