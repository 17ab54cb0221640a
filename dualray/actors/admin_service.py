# ruff: noqa: N802 (the methods bear the protocol's names)
"""`dualray.admin.v1.Admin` over an engine and the run around it."""

from __future__ import annotations

from typing import Any

import grpc

from dualray.actors.admin_control import RunControl
from dualray.actors.engine import Engine
from dualray.actors.engine_pausing import PauseMode
from dualray.actors.engine_state import EngineState
from dualray.actors.mode_answer import Refusal
from dualray.actors.refusals import NotOfferedError, refuse
from dualray.errors import RequestError
from dualray.parallel.slots import ExpertPlacement
from dualray.proto import admin_pb2 as pb
from dualray.proto import admin_pb2_grpc as pb_grpc

ADMIN_SERVICE = "dualray.admin.v1.Admin"
Context = grpc.aio.ServicerContext

_PAUSES = {
    pb.PAUSE_MODE_UNSPECIFIED: PauseMode.ABORT,
    pb.PAUSE_MODE_ABORT: PauseMode.ABORT,
    pb.PAUSE_MODE_WAIT: PauseMode.WAIT,
    pb.PAUSE_MODE_KEEP: PauseMode.KEEP,
}
_MODES = {pb.MODE_TRAIN: "train", pb.MODE_SERVE: "serve", pb.MODE_PAUSE: "pause"}
_NUMBERS = {name: number for number, name in _MODES.items()}


class AdminService(pb_grpc.AdminServicer):
    """Pauses generation, switches modes, and says which weights and experts are where."""

    def __init__(self, engine: Engine, control: RunControl | None = None) -> None:
        """Without `control` there is no run around the engine, so modes are not offered."""
        self._engine, self._control = engine, control

    async def PauseGeneration(
        self, request: pb.PauseGenerationRequest, context: Context
    ) -> pb.PauseGenerationResponse:
        mode = _PAUSES.get(request.mode)
        try:
            if mode is None:
                raise RequestError(
                    f"mode is {request.mode} and must be ABORT (1), WAIT (2) or KEEP (3)",
                    hint="leave it out for ABORT",
                    field="mode",
                )
            held = await self._engine.pausing.hold(mode)
        except Exception as error:
            await refuse(context, error)
        return pb.PauseGenerationResponse(num_requests=held)

    async def ResumeGeneration(
        self, request: pb.ResumeGenerationRequest, context: Context
    ) -> pb.ResumeGenerationResponse:
        try:
            await self._engine.pausing.go_on()
        except Exception as error:
            await refuse(context, error)
        return pb.ResumeGenerationResponse()

    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.SetModeResponse:
        mode = _MODES.get(request.mode)
        try:
            if mode is None:
                raise RequestError(
                    f"mode is {request.mode} and must be TRAIN (1), SERVE (2) or PAUSE (3)",
                    hint="name the mode that the run shall be in",
                    field="mode",
                )
            answer = await self._need_control().switch(mode)
        except Exception as error:
            await refuse(context, error)
        if isinstance(answer, Refusal):
            # Nothing is wrong with the call, and the same one may be right later.
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, f"{answer.sentence}; {answer.hint}."
            )
        return pb.SetModeResponse(
            mode=_NUMBERS[answer.mode],
            switched=answer.switched,
            step=answer.step,
            sentences=answer.sentences,
            first_token_s=answer.first_token_s,
            first_step_s=answer.first_step_s,
            drain_s=answer.drain_s,
            num_cut=answer.num_cut,
        )

    async def GetMode(self, request: Any, context: Context) -> pb.GetModeResponse:
        try:
            status = await self._need_control().status()
        except Exception as error:
            await refuse(context, error)
        return pb.GetModeResponse(
            mode=_NUMBERS.get(status.mode, pb.MODE_UNSPECIFIED),
            run_state=status.state,
            engine_state=str(self._engine.state),
            step=status.step,
        )

    async def GetWeightVersion(self, request: Any, context: Context) -> pb.GetWeightVersionResponse:
        weights = self._engine.weights
        return pb.GetWeightVersionResponse(
            model=self._engine.model_name,
            training_step=weights.training_step,
            digest=weights.digest,
            serving=self._engine.state is EngineState.SERVING,
        )

    async def GetExpertPlacement(
        self, request: Any, context: Context
    ) -> pb.GetExpertPlacementResponse:
        try:
            placement = await self._need_control().placement()
        except Exception as error:
            await refuse(context, error)
        return pb.GetExpertPlacementResponse(
            layers=[_layer(placement, layer) for layer in sorted(placement.held)]
        )

    def _need_control(self) -> RunControl:
        if self._control is None:
            raise NotOfferedError(
                "this engine belongs to no run that could be asked",
                hint="use the admin service of `dualray train` or `dualray serve`",
            )
        return self._control


def _layer(placement: ExpertPlacement, layer: int) -> pb.LayerPlacement:
    ranks = zip(placement.held[layer], placement.num_homes[layer], strict=True)
    return pb.LayerPlacement(
        layer=layer,
        ranks=[pb.RankPlacement(experts=held, num_homes=homes) for held, homes in ranks],
    )
