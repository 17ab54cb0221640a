"""One port with health, reflection and the inference protocols."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2_grpc as vllm_grpc

from dualray.actors.engine import Engine, EngineState
from dualray.actors.grpc_malformed import RefuseMalformed
from dualray.actors.grpc_security import OwnAccess, Security
from dualray.actors.grpc_service import SERVICE, InferenceService
from dualray.actors.listening import SERVER_OPTIONS, address_of, check_free, taken
from dualray.actors.request_records import RequestRecords
from dualray.actors.vllm_service import VLLM_SERVICE, VllmService
from dualray.inference.serve_config import ServeConfig
from dualray.proto import inference_pb2_grpc as pb_grpc

SERVICES = (SERVICE, VLLM_SERVICE)
"""What the port serves; their health follows the engine's state."""


class InferenceServer:
    """A listening gRPC server; the services' health follows the engine's state."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Of `config` the security, the message limit and the records of requests count; by
        default nothing is secured and nothing recorded.

        `files` are those of `model_files`, for gateways that ask for the tokenizer.

        Raises:
            ConfigError: a certificate, key or tokens file cannot be used, or the access log.
        """
        config = config or ServeConfig()
        self._engine = engine
        self._security = Security(config)
        self._records = RequestRecords(engine, config)
        watch = self._records.watch
        self._own_access: OwnAccess | None = None
        self._server = grpc.aio.server(
            interceptors=(engine.metrics.calls, *self._security.interceptors, RefuseMalformed()),
            options=(
                *SERVER_OPTIONS,
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_concurrent_streams", config.max_streams),
            ),
        )
        self._health = health.aio.HealthServicer()  # pyrefly: ignore[missing-attribute]
        self._watch: asyncio.Task[None] | None = None
        inference = InferenceService(engine, watch)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(inference, self._server)
        vllm_grpc.add_VllmEngineServicer_to_server(VllmService(engine, files, watch), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Listens and returns HOST:PORT, with the port found when `port` is 0.

        Raises:
            ResourceError: the port is taken or the host is not this machine's.
        """
        check_free(host, port)
        try:
            address = address_of(host, port)
            port, self._own_access = self._security.listen(self._server, address)
        except RuntimeError as error:  # taken since the check
            raise taken(host, port) from error
        # "" says that the process answers, the service's name whether it takes requests.
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._set_health(self._engine.state)
        await self._server.start()
        self._watch = asyncio.create_task(self._follow_engine(), name="health")
        return address_of(host, port)

    @property
    def own_access(self) -> OwnAccess:
        """How the run itself reaches this server, once it has started, however it is secured."""
        assert self._own_access is not None
        return self._own_access

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives running ones `grace_s` seconds, and closes the port."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        self._security.close()
        await self._records.stop()

    async def _follow_engine(self) -> None:
        state = None
        while True:
            if state is not self._engine.state:
                state = self._engine.state
                await self._set_health(state)
            await self._engine.wait_for_change(state)

    async def _set_health(self, state: EngineState) -> None:
        served = state is EngineState.SERVING
        status = health_pb2.HealthCheckResponse
        for name in SERVICES:
            await self._health.set(name, status.SERVING if served else status.NOT_SERVING)
