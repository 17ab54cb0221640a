"""The admin port: health, reflection and the admin service, with tokens of its own."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from dualray.actors.admin_control import RunControl
from dualray.actors.admin_service import ADMIN_SERVICE, AdminService
from dualray.actors.engine import Engine
from dualray.actors.grpc_malformed import RefuseMalformed
from dualray.actors.grpc_security import Security
from dualray.actors.listening import SERVER_OPTIONS, address_of, check_free, taken
from dualray.inference.serve_config import ServeConfig
from dualray.proto import admin_pb2_grpc as pb_grpc

_SECTION = "serve.admin_"
_MESSAGE_BYTES = 64 * 1024


class AdminServer:
    """A listening gRPC server. Its services take calls whatever the engine does."""

    def __init__(
        self, engine: Engine, config: ServeConfig, control: RunControl | None = None
    ) -> None:
        """Raises ConfigError if a certificate, key or tokens file cannot be used."""
        self._security = Security(config, is_admin=True)
        self._server = grpc.aio.server(
            interceptors=(*self._security.interceptors, RefuseMalformed()),
            options=(*SERVER_OPTIONS, ("grpc.max_receive_message_length", _MESSAGE_BYTES)),
        )
        self._health = health.aio.HealthServicer()  # pyrefly: ignore[missing-attribute]
        pb_grpc.add_AdminServicer_to_server(AdminService(engine, control), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (ADMIN_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, host: str, port: int) -> str:
        """Listens and returns HOST:PORT, with the port found when `port` is 0.

        Raises:
            ResourceError: the port is taken or the host is not this machine's.
        """
        check_free(host, port, _SECTION)
        try:
            port = self._security.add_port(self._server, address_of(host, port))
        except RuntimeError as error:  # taken since the check
            raise taken(host, port, _SECTION) from error
        for name in ("", ADMIN_SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return address_of(host, port)

    async def stop(self, grace_s: float) -> None:
        """Gives running calls `grace_s` seconds, and closes the port."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
