"""With which code a call ended, as the handler that ran it tells."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def code_of(error: BaseException | None, context: Any) -> grpc.StatusCode:
    """Of a handler that raised `error`, or returned if that is None."""
    if error is None or isinstance(error, grpc.aio.AbortError):
        code = context.code()  # a code, its number, or nothing, which is OK
        return code if isinstance(code, grpc.StatusCode) else _CODES[code or 0]
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left = context.time_remaining()
        in_time = left is None or left > 0
        return grpc.StatusCode.CANCELLED if in_time else grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.UNKNOWN  # what the server answers when a handler raises
