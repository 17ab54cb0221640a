"""How a request's end is named, whatever ended it."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import grpc
import pytest

from dualray.actors.completion import Weights
from dualray.actors.request_watch import RequestWatch
from dualray.inference.request import DeadlineError, NotServingError, RequestError

Code = grpc.StatusCode
ENGINE = SimpleNamespace(model_name="tiny", weights=Weights(training_step=3, digest="d"))
INFER = "/inference.GRPCInferenceService/ModelInfer"


class Context:
    """What a watch asks of gRPC's."""

    def __init__(self, left_s: float | None = None, code: Code | None = None) -> None:
        self.left_s, self.set_code = left_s, code

    def peer(self) -> str:
        return "ipv6:%5B::1%5D:1234"

    def invocation_metadata(self):
        return (("authorization", "Bearer secret"), ("tracestate", "a=1"), ("tracestate-bin", b"x"))

    def time_remaining(self) -> float | None:
        return self.left_s

    def code(self) -> Code | None:
        return self.set_code


@pytest.mark.parametrize(
    ("error", "context", "code", "field"),
    [
        (None, Context(), Code.OK, None),
        (
            RequestError("no", hint="do", field="temperature"),
            Context(),
            Code.INVALID_ARGUMENT,
            "temperature",
        ),
        (NotServingError("no", hint="do"), Context(), Code.UNAVAILABLE, ""),
        (DeadlineError("no", hint="do"), Context(), Code.DEADLINE_EXCEEDED, ""),
        (asyncio.CancelledError(), Context(), Code.CANCELLED, None),
        (asyncio.CancelledError(), Context(5.0), Code.CANCELLED, None),
        (asyncio.CancelledError(), Context(0.0), Code.DEADLINE_EXCEEDED, None),
        (grpc.aio.AbortError(), Context(code=Code.NOT_FOUND), Code.NOT_FOUND, None),
        (ZeroDivisionError(), Context(), Code.INTERNAL, None),
    ],
)
def test_what_is_raised_names_the_code(error, context, code, field):
    told = []
    watch = RequestWatch(ENGINE, [told.append])

    def run():
        with watch.request(INFER, "x" * 300, context):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    [ended] = told
    assert (ended.code, ended.refused_field, ended.peer) == (code, field, "ipv6:[::1]:1234")
    assert ended.trace_headers == {"tracestate": "a=1"}
    assert ended.request_id == "x" * 256
    # The same call's end is no request more.
    watch.call_ended(INFER, code, context)
    assert len(told) == 1


def test_calls_that_never_became_a_request_are_told_if_somebody_was_refused():
    told = []
    watch = RequestWatch(ENGINE, [told.append])
    for method, code in [
        (INFER, Code.OK),  # a stream on which nothing came
        (INFER, Code.CANCELLED),
        ("/grpc.health.v1.Health/Watch", Code.DEADLINE_EXCEEDED),
        (INFER, Code.INVALID_ARGUMENT),
        ("/inference.GRPCInferenceService/ModelMetadata", Code.NOT_FOUND),
        ("/inference.GRPCInferenceService/ModelMetadata", Code.UNAUTHENTICATED),
    ]:
        watch.call_ended(method, code, Context())
    assert [ended.code for ended in told] == [Code.INVALID_ARGUMENT, Code.UNAUTHENTICATED]


def test_a_record_that_cannot_be_kept_keeps_no_request_from_ending(caplog):
    def broken(ended) -> None:
        raise OSError("no")

    with RequestWatch(ENGINE, [broken]).request(INFER, "", Context()):
        pass
    assert [r.levelno for r in caplog.records] == [logging.ERROR]
