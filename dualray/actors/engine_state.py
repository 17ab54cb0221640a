"""What an engine is at: its states, and the gate that its steps go through."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from dualray.inference.request import NotServingError, NoWeightsError


class EngineState(StrEnum):
    NO_WEIGHTS = "no weights"
    """Nothing has been trained or loaded yet."""
    TRAINING = "training"
    """The workers train."""
    SERVING = "serving"
    DRAINING = "draining"
    """Accepted requests end, new ones are refused."""
    HELD = "held"
    """Generation was paused: accepted requests have ended or stand still until it goes on."""
    PAUSED = "paused"
    """The workers neither train nor serve."""
    FAILED = "failed"
    """The workers are lost."""
    STOPPED = "stopped"


ENDED = (EngineState.FAILED, EngineState.STOPPED)


class States:
    """The present state of one engine, and who waits for another. Use from one event loop."""

    def __init__(self, retry_after_s: float = 30.0) -> None:
        """Callers who are refused are asked to come again after `retry_after_s` seconds."""
        self.now = EngineState.NO_WEIGHTS
        self.retry_after_s = retry_after_s
        self._changed = asyncio.Condition()

    async def enter(self, state: EngineState) -> None:
        async with self._changed:
            self.now = state
            self._changed.notify_all()

    async def wait_for_change(self, known: EngineState) -> EngineState:
        """Returns the state as soon as it differs from `known`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.now is not known)
        return self.now

    def need_serving(self, model_name: str) -> None:
        """Raises NoWeightsError or NotServingError unless requests are taken."""
        if self.now is EngineState.SERVING:
            return
        if self.now is EngineState.NO_WEIGHTS:
            raise NoWeightsError(
                f"model {model_name} has no weights yet",
                hint="wait for the first training step or load a checkpoint",
            )
        raise NotServingError(
            f"model {model_name} does not serve now, it is {self.now}",
            hint="watch the health service and try again",
            retry_after_s=self.retry_after_s,
        )


class StepGate:
    """Lets the engine's loop make steps, or makes it stand still between two of them."""

    def __init__(self) -> None:
        self._open, self._rest = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._rest.set()

    async def wait_open(self) -> None:
        """For the loop: returns when a step may begin, which has to be at once then."""
        while not self._open.is_set():
            await self._open.wait()

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step is under way inside."""
        self._rest.clear()
        try:
            yield
        finally:
            self._rest.set()

    def close(self) -> None:
        """No step begins until `open`."""
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    async def wait_rest(self) -> None:
        """Returns when no step is under way: a request that is cancelled leaves its step behind."""
        await self._rest.wait()
