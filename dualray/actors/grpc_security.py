"""Who may speak to the server: TLS, client certificates, bearer tokens, and the run itself.

Health and reflection need no token: probes carry none, and neither tells more than whether the
server takes requests and what protocol it speaks. Client certificates hold for the whole port.

The run asks itself for its first token. It has no client certificate and no reason to trust its
own, so that a secured server also listens on a Unix socket that only its user can reach, and
takes one token more, which never leaves the run's actors.
"""

from __future__ import annotations

import hmac
import inspect
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from dualray.actors.bearer_tokens import TokenFile
from dualray.actors.own_socket import OwnSocket
from dualray.actors.tls_files import TlsFiles
from dualray.inference.serve_config import ServeConfig

OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
"""Where who listens on every address is reached from the same machine."""
_NO_TOKEN = (
    "the call carries no bearer token; send the metadata authorization: Bearer TOKEN with one of "
    "the server's tokens."
)
_WRONG_TOKEN = "the call's bearer token is not one of the server's; ask for one that is valid now."
_LESSER_TOKEN = (
    "the call's bearer token may ask the model but not for this; use one of the admin service's."
)


@dataclass(frozen=True, kw_only=True)
class OwnAccess:
    """How the run's own controller, on the same machine, reaches its server."""

    target: str
    token: str | None = field(repr=False)


class TokenGuard(grpc.aio.ServerInterceptor):
    """Refuses calls without a valid token as UNAUTHENTICATED, before their messages are read.

    A stream of requests may stay open for days, so that each of its messages needs the token to
    be valid still. When it no longer is, what was accepted is answered and the stream ends.
    """

    def __init__(self, tokens: TokenFile, own_token: str, lesser: TokenFile | None = None) -> None:
        """Tokens that are among the `lesser` only are refused as PERMISSION_DENIED."""
        self._tokens, self._lesser = tokens, lesser
        self._own_token = own_token.encode()
        self._no_token = _refusing(_NO_TOKEN)
        self._wrong_token = _refusing(_WRONG_TOKEN)
        self._lesser_token = _refusing(_LESSER_TOKEN, grpc.StatusCode.PERMISSION_DENIED)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, or one that refuses."""
        details: Any = handler_call_details
        if details.method.startswith(OPEN_SERVICES):
            return await continuation(handler_call_details)
        token = _bearer(details.invocation_metadata)
        if token is None:
            return self._no_token
        if not self._accepts(token):
            is_lesser = self._lesser is not None and self._lesser.accepts(token)
            return self._lesser_token if is_lesser else self._wrong_token
        handler = await continuation(handler_call_details)
        if handler is not None and handler.request_streaming:
            return self._asking_again(handler, token)
        return handler

    def _accepts(self, token: str) -> bool:
        own = hmac.compare_digest(token.encode(), self._own_token)
        return self._tokens.accepts(token) or own

    def _asking_again(self, handler: Any, token: str) -> grpc.RpcMethodHandler:
        run = handler.stream_stream
        assert inspect.iscoroutinefunction(run), "no other handler takes a stream of requests"

        async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            refused = False

            async def accepted() -> AsyncIterator[Any]:
                nonlocal refused
                async for request in requests:
                    refused = not self._accepts(token)
                    if refused:
                        return
                    yield request

            await run(accepted(), context)
            if refused:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, _WRONG_TOKEN)

        return grpc.stream_stream_rpc_method_handler(
            guarded, handler.request_deserializer, handler.response_serializer
        )


class Security:
    """What `serve` asks for, read from its files. Raises ConfigError if one cannot be used.

    `is_admin` is for the admin service's port, whose tokens are others.
    """

    def __init__(self, config: ServeConfig, *, is_admin: bool = False) -> None:
        self._tls: TlsFiles | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            self._tls = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
        self._own_token: str | None = None
        self.interceptors: tuple[grpc.aio.ServerInterceptor, ...] = ()
        lesser = _tokens(config, "tokens_file") if is_admin else None
        tokens = _tokens(config, "admin_tokens_file" if is_admin else "tokens_file")
        assert tokens is not None or lesser is None, "the admin service would be open to all"
        if tokens is not None:
            self._own_token = secrets.token_urlsafe(32)
            self.interceptors = (TokenGuard(tokens, self._own_token, lesser),)
        self._socket: OwnSocket | None = None

    def listen(self, server: grpc.aio.Server, address: str) -> tuple[int, OwnAccess]:
        """Adds the port, and with TLS the run's own socket; the port found, and the own access.

        Raises RuntimeError if the port is taken.
        """
        host, port = address.rpartition(":")[0], self.add_port(server, address)
        if self._tls is None:
            host = _LOOPBACK.get(host, host)
            return port, OwnAccess(target=f"{host}:{port}", token=self._own_token)
        self._socket = OwnSocket()
        own = f"unix:{self._socket.path}"
        server.add_insecure_port(own)
        return port, OwnAccess(target=own, token=self._own_token)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Adds the port and nothing else; returns it. Raises RuntimeError if it is taken."""
        if self._tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, self._tls.credentials())

    def close(self) -> None:
        """Removes the run's own socket."""
        if self._socket is not None:
            self._socket.close()


def _tokens(config: ServeConfig, field: str) -> TokenFile | None:
    path = getattr(config, field)
    return None if path is None else TokenFile(Path(path), f"serve.{field}")


def _bearer(metadata: Any) -> str | None:
    """The token of the one `authorization` entry; two of them are as good as none."""
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) != 1:
        return None
    scheme, _, token = values[0].partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _refusing(
    sentence: str, code: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED
) -> grpc.RpcMethodHandler:
    """A stream handler that reads nothing answers calls of every kind."""

    async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, sentence)

    return grpc.stream_stream_rpc_method_handler(refuse)
