"""How an engine stops serving, for a while or for good, and what becomes of accepted requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from enum import StrEnum

from dualray.actors.completion import Completion
from dualray.actors.engine_state import ENDED, EngineState, States, StepGate
from dualray.inference.request import NotServingError, RequestError


class PauseMode(StrEnum):
    """What becomes of accepted requests when generation is paused; vLLM's names."""

    ABORT = "abort"
    """They end at once, with finish reason `abort`."""
    WAIT = "wait"
    """They end of themselves."""
    KEEP = "keep"
    """They stand still and go on later; their deadlines do not wait."""


class Pausing:
    """One engine's way out of serving and back. Use from its event loop only."""

    def __init__(
        self,
        model_name: str,
        states: States,
        gate: StepGate,
        idle: asyncio.Event,
        accepted: Callable[[], Collection[Completion]],
        fail_all: Callable[[RequestError], None],
    ) -> None:
        """`idle` is set while nothing is `accepted`, which `fail_all` brings about."""
        self._model_name = model_name
        self._states, self._gate, self._idle = states, gate, idle
        self._accepted, self._fail_all = accepted, fail_all

    async def drain(self, then: EngineState, within_s: float | None = None) -> int:
        """Refuses new requests, lets the accepted ones end, and enters `then`.

        Those that take longer than `within_s` seconds end with NotServingError; returns how many.
        No worker computes then. What has failed or stopped stays so.
        """
        if self._states.now in ENDED:
            return 0
        await self._states.enter(EngineState.DRAINING)
        self._gate.open()
        num_cut = 0
        try:
            async with asyncio.timeout(within_s):
                await self._idle.wait()
        except TimeoutError:
            num_cut = len(self._accepted())
            self._fail_all(
                NotServingError(
                    f"model {self._model_name} stops serving and the completion did not end "
                    f"within {within_s:g} s",
                    hint="ask another server, or again when this one serves",
                    retry_after_s=self._states.retry_after_s,
                )
            )
        await self._gate.wait_rest()
        if self._states.now is EngineState.DRAINING:
            await self._states.enter(then)
        return num_cut

    async def hold(self, mode: PauseMode) -> int:
        """Pauses generation until `go_on`; new requests are refused.

        Returns how many requests were accepted before. No worker computes then, unless `go_on`
        came first.

        Raises:
            NotServingError, NoWeightsError: the engine does not serve.
        """
        self._need_engaged()
        await self._states.enter(EngineState.HELD)
        accepted = list(self._accepted())
        if mode is PauseMode.KEEP:
            self._gate.close()
        elif mode is PauseMode.ABORT:
            for completion in accepted:
                completion.abort()
        else:
            self._gate.open()
            await self._until_idle_or_not_held()
        if self._states.now is EngineState.HELD:
            await self._gate.wait_rest()
        return len(accepted)

    async def go_on(self) -> None:
        """Ends a pause; nothing happens without one.

        Raises:
            NotServingError, NoWeightsError: the engine does not serve.
        """
        self._need_engaged()
        self._gate.open()
        await self._states.enter(EngineState.SERVING)

    async def end_pause(self) -> bool:
        """Lets generation go on if it is paused; returns whether it was."""
        if self._states.now is not EngineState.HELD:
            return False
        await self.go_on()
        return True

    def _need_engaged(self) -> None:
        if self._states.now is not EngineState.HELD:
            self._states.need_serving(self._model_name)

    async def _until_idle_or_not_held(self) -> None:
        waits = [
            asyncio.create_task(self._idle.wait()),
            asyncio.create_task(self._states.wait_for_change(EngineState.HELD)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
