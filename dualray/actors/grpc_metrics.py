"""Counts gRPC calls under the names that Go's gRPC servers use: grpc_server_started_total and
grpc_server_handled_total, codes in Go's spelling."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from prometheus_client import CollectorRegistry, Counter

from dualray.actors.grpc_codes import code_of
from dualray.actors.grpc_handlers import run_of, with_run

_METHOD = ("grpc_type", "grpc_service", "grpc_method")
_TYPES = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
_GO_NAMES = {code: code.name.title().replace("_", "") for code in grpc.StatusCode} | {
    grpc.StatusCode.OK: "OK",
    grpc.StatusCode.CANCELLED: "Canceled",
}


WhenEnded = Callable[[str, grpc.StatusCode, Any], None]
"""Takes a call's method, as /SERVICE/METHOD, its code and its context."""


class CallCounter(grpc.aio.ServerInterceptor):
    """Counts calls of the server's methods. Put it first: it then sees what others refuse.

    A refused call has the type of the handler that refuses it. Calls of unknown methods do not
    count: a series for each name would let callers fill the memory.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.when_ended: WhenEnded | None = None
        """Hears of every call that has ended."""
        self._started = Counter("grpc_server_started", "Calls started.", _METHOD, registry=registry)
        self._handled = Counter(
            "grpc_server_handled",
            "Calls ended, by code.",
            (*_METHOD, "grpc_code"),
            registry=registry,
        )

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, counted."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        details: Any = handler_call_details
        _, service, method = details.method.split("/", 2)
        labels = (_TYPES[handler.request_streaming, handler.response_streaming], service, method)
        return with_run(handler, self._counted(run_of(handler), labels))

    def _counted(self, run: Callable[..., Any], labels: tuple[str, ...]) -> Callable[..., Any]:
        """`run` as the same kind of function: the server looks at which one it is."""
        if inspect.isasyncgenfunction(run):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                with self._call(labels, context):
                    async for response in run(request, context):
                        yield response

            return stream
        assert inspect.iscoroutinefunction(run), "a server of coroutines has no other handlers"

        async def call(request: Any, context: Any) -> Any:
            with self._call(labels, context):
                return await run(request, context)

        return call

    @contextmanager
    def _call(self, labels: tuple[str, ...], context: Any) -> Iterator[None]:
        self._started.labels(*labels).inc()
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            code = code_of(error, context)
            self._handled.labels(*labels, _GO_NAMES[code]).inc()
            if self.when_ended is not None:
                self.when_ended(f"/{labels[1]}/{labels[2]}", code, context)
