"""An admin server beside a served model, around which there is a run that cannot train."""

from __future__ import annotations

from dataclasses import dataclass, field

from support.serving import Served

from dualray.actors.admin_control import RunStatus
from dualray.actors.admin_server import AdminServer
from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.inference.serve_config import ServeConfig
from dualray.parallel.slots import ExpertPlacement


@dataclass
class Run:
    """A run around the engine that is in one mode and cannot train."""

    mode: str = "serve"
    asked: list[str] = field(default_factory=list)

    async def switch(self, mode: str) -> ModeAnswer | Refusal:
        self.asked.append(mode)
        if mode == "train":
            return Refusal(sentence="run tiny has no steps left", hint="serve on")
        was, self.mode = self.mode, mode
        return ModeAnswer(
            mode=mode, switched=was != mode, step=7, sentences=("done",), first_token_s=0.25
        )

    async def status(self) -> RunStatus:
        return RunStatus(mode=self.mode, state="serving", step=7)

    async def placement(self) -> ExpertPlacement:
        return ExpertPlacement(
            held={4: ((2, 0, 1), (1, 3)), 1: ((0, 1), (2, 3))}, num_homes={4: (2, 2), 1: (2, 2)}
        )


class Admin:
    """An admin server beside a served model, on its loop."""

    def __init__(self, served: Served, config: ServeConfig, run: Run | None) -> None:
        self.served, self.run = served, run
        self.target = served.call(self._start(config))

    async def _start(self, config: ServeConfig) -> str:
        self.server = AdminServer(self.served.engine, config, self.run)
        return await self.server.start("127.0.0.1", 0)

    def close(self) -> None:
        self.served.call(self.server.stop(0))
