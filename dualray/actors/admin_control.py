"""What the admin service asks of the run around the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from dualray.actors.cluster import NAMESPACE
from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.inference.request import NotServingError
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What a run is doing."""

    mode: str
    """train, serve or pause; empty while it starts."""
    state: str
    step: int
    """Optimizer steps done."""


class RunControl(Protocol):
    """The run that an engine belongs to."""

    async def switch(self, mode: str) -> ModeAnswer | Refusal:
        """Returns when the run is in that mode, or will not be."""
        ...

    async def status(self) -> RunStatus: ...

    async def placement(self) -> ExpertPlacement:
        """Where routed experts are at present."""
        ...


class ControllerOf:
    """`RunControl` over the controller of a run of that name, an actor of the same cluster."""

    def __init__(self, run_name: str, moved: Callable[[], ExpertPlacement | None]) -> None:
        """`moved` says where experts are if it is the engine that moves them."""
        self._name, self._moved = f"{run_name}.controller", moved
        self._controller: Any = None

    async def switch(self, mode: str) -> ModeAnswer | Refusal:
        return await self._ask("switch", mode)

    async def status(self) -> RunStatus:
        status = await self._ask("status")
        return RunStatus(mode=status["mode"], state=status["state"], step=status["step"])

    async def placement(self) -> ExpertPlacement:
        return self._moved() or await self._ask("placement")

    async def _ask(self, method: str, *args: str) -> Any:
        try:
            if self._controller is None:
                self._controller = ray.get_actor(self._name, namespace=NAMESPACE)
            return await getattr(self._controller, method).remote(*args)
        except (ValueError, RayActorError):  # nobody of that name, or not any more
            raise NotServingError(
                f"{self._name} does not answer", hint="see whether the run lives"
            ) from None
