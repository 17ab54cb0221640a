"""Answers bytes that are no message of the method as the caller's mistake.

By itself grpc.aio lets what its deserializer raises pass for a fault of the server's (UNKNOWN).
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dualray.actors.grpc_handlers import run_of, with_run


class _Malformed:
    """Stands for a message that could not be read."""

    def __init__(self, error: Exception) -> None:
        self.sentence = f"the message cannot be read ({error}); send what the method's proto says."


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Ends a call with a malformed message as INVALID_ARGUMENT.

    On a stream of requests those before it are answered first.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, which never sees a malformed message."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        guard = _guarded_stream if handler.request_streaming else _guarded_call
        return with_run(handler, guard(run_of(handler)), _reading(handler.request_deserializer))


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError as error:
            return _Malformed(error)

    return read


def _guarded_call(run: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(run):

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await _refuse(request, context)
            async for response in run(request, context):
                yield response

        return stream

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        await _refuse(request, context)
        return await run(request, context)

    return call


def _guarded_stream(run: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(run):

        async def stream(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            readable = _Readable(requests)
            async for response in run(readable, context):
                yield response
            await _refuse(readable.bad, context)

        return stream

    async def call(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        readable = _Readable(requests)
        response = await run(readable, context)
        await _refuse(readable.bad, context)
        return response

    return call


class _Readable:
    """The messages of a stream up to the first malformed one, which is kept."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._requests = requests
        self.bad: _Malformed | None = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for request in self._requests:
            if isinstance(request, _Malformed):
                self.bad = request
                return
            yield request


async def _refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
    if isinstance(request, _Malformed):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.sentence)
