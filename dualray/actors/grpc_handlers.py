"""A method's handler, taken apart and put together again: what interceptors do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc


def run_of(handler: Any) -> Callable[..., Any]:
    """The function that answers: of the four kinds of a handler the one that it has."""
    if handler.request_streaming:
        return handler.stream_stream if handler.response_streaming else handler.stream_unary
    return handler.unary_stream if handler.response_streaming else handler.unary_unary


def with_run(
    handler: Any, run: Callable[..., Any], deserializer: Callable[[bytes], Any] | None = None
) -> grpc.RpcMethodHandler:
    """`handler` with another function of the same kind, and another deserializer if one is given.

    The server looks at whether it is a coroutine function or an asynchronous generator, so that
    `run` must be what it replaces.
    """
    if handler.request_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
    else:
        make = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
    return make(run, deserializer or handler.request_deserializer, handler.response_serializer)
