"""How a refusal travels over gRPC, and what every answer says of who gave it."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NoReturn

import grpc

from dualray.actors.engine_state import EngineState
from dualray.errors import RequestError
from dualray.inference.request import (
    DeadlineError,
    ModelNotFoundError,
    NotServingError,
    NoWeightsError,
    QueueFullError,
    ServerFaultError,
)

if TYPE_CHECKING:
    from dualray.actors.engine import Engine

Context = grpc.aio.ServicerContext

_MAX_SENTENCE = 1000  # statuses travel in headers, which clients limit to 8 KiB
_RETRY_AFTER = "retry-after"
_log = logging.getLogger(__name__)


class NotOfferedError(RequestError):
    """The protocol has it and this server does not."""


class NoTokenizerError(RequestError):
    """The server has no tokenizer's files to hand out."""


_CODES: dict[type[RequestError], grpc.StatusCode] = {
    ModelNotFoundError: grpc.StatusCode.NOT_FOUND,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NotServingError: grpc.StatusCode.UNAVAILABLE,
    NoWeightsError: grpc.StatusCode.FAILED_PRECONDITION,
    NoTokenizerError: grpc.StatusCode.FAILED_PRECONDITION,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ServerFaultError: grpc.StatusCode.INTERNAL,
    NotOfferedError: grpc.StatusCode.UNIMPLEMENTED,
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
}


def status_of(error: RequestError) -> grpc.StatusCode:
    """The gRPC code that a refusal travels as."""
    return _CODES[type(error)]


def refusal_of(error: Exception) -> RequestError:
    """The error as the caller gets it; what is no refusal is our own fault and is logged."""
    if isinstance(error, RequestError):
        return error
    _log.exception("a request failed", exc_info=error)
    return ServerFaultError(
        f"the server failed with {type(error).__name__}", hint="see the engine's log"
    )


def sentence_of(refusal: RequestError) -> str:
    """What the caller reads. It may quote the request, so it is cut to what a status can carry."""
    text = str(refusal).encode(errors="replace").decode()
    return text if len(text) <= _MAX_SENTENCE else f"{text[: _MAX_SENTENCE - 3]}..."


async def refuse(context: Context, error: Exception) -> NoReturn:
    """Ends the call with the status of `error`. Raises gRPC's AbortError always."""
    refusal = refusal_of(error)
    if isinstance(refusal, NotServingError):
        _ask_again_later(context, refusal.retry_after_s)
    await context.abort(status_of(refusal), sentence_of(refusal))
    raise AssertionError("abort raises")


def set_trailer(context: Context, engine: Engine) -> None:
    """Says who answers, in the metadata behind the answer; refusals carry it too."""
    context.set_trailing_metadata(
        (
            ("dualray-model", engine.model_name),
            ("dualray-training-step", str(engine.weights.training_step)),
            ("dualray-weight-digest", engine.weights.digest),
        )
    )
    # At the beginning: a refusal inside a stream has no status of its own to bring it.
    if engine.state is not EngineState.SERVING:
        _ask_again_later(context, engine.states.retry_after_s)


def _ask_again_later(context: Context, retry_after_s: float | None) -> None:
    """Adds to the trailer when to come again, in seconds, and in gRPC's own way, which clients
    with a retry policy follow. Once is enough."""
    given = tuple(context.trailing_metadata() or ())
    if retry_after_s is None or any(key == _RETRY_AFTER for key, _ in given):
        return
    seconds, milliseconds = math.ceil(retry_after_s), math.ceil(1000 * retry_after_s)
    context.set_trailing_metadata(
        (*given, (_RETRY_AFTER, str(seconds)), ("grpc-retry-pushback-ms", str(milliseconds)))
    )
