"""What the engine's actor needs of a worker, without Ray: a door behind which plans run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dualray.actors.plan_channel import Door, PlanDoor
from dualray.inference.plan import StepPlan


class DoorWorker:
    """Its `open_plans.remote` can be awaited, as an actor's method can; `run` is its `run_plan`."""

    def __init__(self, run: Callable[[StepPlan], Any]) -> None:
        self.num_calls = 0
        self.door: PlanDoor | None = None
        self._run = run

    @property
    def open_plans(self) -> DoorWorker:
        return self

    async def remote(self, engine_node: str) -> Door:
        if self.door is not None:
            self.door.close()
        self.door = PlanDoor("127.0.0.1", self._counted)
        return self.door.at

    def _counted(self, plan: StepPlan) -> Any:
        self.num_calls += 1
        return self._run(plan)
