"""Notices when a request ends, however it does, and tells those who keep books of it.

A request is what a caller asks for at once: a unary call, or one message of a stream. It may be
several completions, or none if it was refused.
"""

from __future__ import annotations

import logging
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from dualray.actors.completion import Completion, Weights
from dualray.actors.engine import Engine
from dualray.actors.grpc_codes import code_of
from dualray.actors.refusals import Context, status_of
from dualray.errors import RequestError

REQUEST_METHODS = frozenset(
    {
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelStreamInfer",
        "/vllm.grpc.engine.VllmEngine/Generate",
    }
)
"""Methods whose calls ask for completions."""
STRANGERS = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
"""Codes of those who may not ask at all."""
_NO_REFUSAL = (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)
_TRACE_HEADERS = ("traceparent", "tracestate")
_MAX_ID = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EndedRequest:
    """What is known of a request that has ended. Moments are nanoseconds of the monotonic clock,
    None if they never came."""

    method: str
    """/SERVICE/METHOD."""
    peer: str
    """gRPC's word for who called, such as ipv4:10.0.0.7:50312."""
    request_id: str
    """The caller's; without one the engine's, empty if it was refused before it had any."""
    model: str
    weights: Weights
    """Those that answered, or would have."""
    code: grpc.StatusCode
    refused_field: str | None
    """Which field a refusal names, if it names one."""
    completions: tuple[Completion, ...]
    arrived_ns: int
    ended_ns: int
    ended_unix_ns: int
    """The same moment in nanoseconds since the epoch."""
    trace_headers: dict[str, str]
    """W3C trace context of the caller, if it sent any: traceparent and tracestate."""

    @property
    def started_ns(self) -> int | None:
        """The first step that ran a part of it."""
        return min(
            (c.started_ns for c in self.completions if c.started_ns is not None), default=None
        )

    @property
    def first_token_ns(self) -> int | None:
        moments = (c.first_token_ns for c in self.completions if c.first_token_ns is not None)
        return min(moments, default=None)

    @property
    def last_token_ns(self) -> int | None:
        moments = (c.last_token_ns for c in self.completions if c.last_token_ns is not None)
        return max(moments, default=None)

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt once, however many completions share it."""
        return len(self.completions[0].request.prompt_ids) if self.completions else 0

    @property
    def num_output_tokens(self) -> int:
        return sum(completion.num_tokens for completion in self.completions)

    @property
    def num_cached_tokens(self) -> int:
        """Of the prompt, what the prefix cache had when its first completion began."""
        return self.completions[0].num_cached_tokens if self.completions else 0

    @property
    def num_preemptions(self) -> int:
        return sum(completion.num_preemptions for completion in self.completions)

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Why each completion ended (vLLM's words)."""
        return tuple(str(c.finish) for c in self.completions if c.finish is not None)

    def seconds_since_arrival(self, moment_ns: int | None) -> float | None:
        return None if moment_ns is None else (moment_ns - self.arrived_ns) / 1e9


Observer = Callable[[EndedRequest], None]
"""Hears of a request's end on the server's loop, so that it must be quick."""


class Watched:
    """A request on its way. The service sets which completions it became."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.completions: Sequence[Completion] = ()


class RequestWatch:
    """One for a server. Services put `request` around each request that they answer."""

    def __init__(self, engine: Engine, observers: Sequence[Observer] = ()) -> None:
        self._engine = engine
        self._observers = tuple(observers)
        self._seen: set[int] = set()
        """Contexts of present calls in which a request began."""

    @contextmanager
    def request(self, method: str, request_id: str, context: Context) -> Iterator[Watched]:
        """Holds for a request's time; what is raised through it is how the request ended."""
        watched = Watched(request_id)
        if not self._observers:
            yield watched
            return
        self._seen.add(id(context))
        arrived_ns = time.monotonic_ns()
        error: BaseException | None = None
        try:
            yield watched
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._tell(method, watched, context, _code_of(error, context), error, arrived_ns)

    def call_ended(self, method: str, code: grpc.StatusCode, context: Context) -> None:
        """A call has ended, whatever it was. Tells of those that were refused before they became
        a request, by their token or their form. Those that gRPC itself refuses, for their size or
        number, never come here."""
        was_request = id(context) in self._seen
        self._seen.discard(id(context))
        refused = method in REQUEST_METHODS and not was_request and code not in _NO_REFUSAL
        if self._observers and (refused or code in STRANGERS):
            self._tell(method, Watched(""), context, code, None, time.monotonic_ns())

    def _tell(
        self,
        method: str,
        watched: Watched,
        context: Any,
        code: grpc.StatusCode,
        error: BaseException | None,
        arrived_ns: int,
    ) -> None:
        completions = tuple(watched.completions)
        request_id = watched.request_id
        if not request_id and completions:
            request_id = completions[0].request.request_id
        try:
            ended = EndedRequest(
                method=method,
                peer=urllib.parse.unquote(context.peer()),
                request_id=request_id[:_MAX_ID],
                model=self._engine.model_name,
                weights=completions[0].weights if completions else self._engine.weights,
                code=code,
                refused_field=error.field if isinstance(error, RequestError) else None,
                completions=completions,
                arrived_ns=arrived_ns,
                ended_ns=time.monotonic_ns(),
                ended_unix_ns=time.time_ns(),
                trace_headers=_trace_headers(context),
            )
            for observe in self._observers:
                observe(ended)
        except Exception:  # books must not keep a request from ending
            _log.exception("a request's end could not be recorded")


def _trace_headers(context: Any) -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {k: v for k, v in metadata if k in _TRACE_HEADERS and isinstance(v, str)}


def _code_of(error: BaseException | None, context: Any) -> grpc.StatusCode:
    """As the caller hears it from the service, which is still to translate a refusal."""
    if isinstance(error, RequestError):
        return status_of(error)
    code = code_of(error, context)
    return grpc.StatusCode.INTERNAL if code is grpc.StatusCode.UNKNOWN else code
