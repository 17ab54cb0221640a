"""OpenTelemetry traces of requests: a span for each, with what it spent its time on below it.

Names of spans and attributes are vLLM's (its `vllm/tracing`), so that what was made for its
traces reads ours: `llm_request` is the whole. Its children `queue`, `prefill` and `decode` are
there once for each completion. The caller's W3C trace context makes the span a child of its own,
and decides whether it is recorded. Spans are made when a request has ended, from moments that
were noted anyway, and leave through a thread of OpenTelemetry's. Making them takes the server's
loop 0.2 ms a request (2 busy x86 cores).

Needs opentelemetry-sdk and opentelemetry-exporter-otlp-proto-grpc: nothing else may import this.
"""

from __future__ import annotations

import asyncio
import os
import threading

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import dualray
from dualray.actors.completion import Completion
from dualray.actors.request_watch import STRANGERS, EndedRequest

Attributes = dict[str, str | int | float | list[str]]

SPAN_NAME = "llm_request"
_EXPORT_LIMIT_S = 5.0
"""For one batch of spans; a collector that is away for longer loses them."""
_STOP_LIMIT_S = 3.0
_FAULTS = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
)
"""Codes that are a server's errors, others being its callers' (OpenTelemetry's conventions)."""


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends to http://HOST:PORT or, encrypted, to https://HOST:PORT over gRPC.

    OpenTelemetry's own environment variables give headers and certificates.
    """
    insecure = endpoint.startswith("http://")
    return OTLPSpanExporter(endpoint=endpoint, insecure=insecure, timeout=_EXPORT_LIMIT_S)


class RequestTracer:
    """An observer of requests that makes spans of them."""

    def __init__(self, exporter: SpanExporter) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", "dualray")
        resource = Resource.create({"service.name": name, "service.version": dualray.__version__})
        # Its own: a process-wide one would also get the spans of Ray, or of another engine.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = exporter
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("dualray", dualray.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, ended: EndedRequest) -> None:
        if ended.code in STRANGERS:
            return  # whoever has no token must not fill the collector
        to_epoch_ns = ended.ended_unix_ns - ended.ended_ns
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(ended.trace_headers),
            kind=SpanKind.SERVER,
            start_time=ended.arrived_ns + to_epoch_ns,
        )
        if span.is_recording():
            span.set_attributes(attributes_of(ended))
            if ended.code in _FAULTS:
                span.set_status(Status(StatusCode.ERROR, ended.code.name))
            for index, completion in enumerate(ended.completions):
                self._phases(span, index, completion, ended.ended_ns, to_epoch_ns)
        span.end(ended.ended_unix_ns)

    async def stop(self) -> None:
        """Sends what is left, for as long as a collector that does not answer may take."""
        stopping = threading.Thread(target=self._provider.shutdown, daemon=True)
        stopping.start()
        await asyncio.to_thread(stopping.join, _STOP_LIMIT_S)
        if stopping.is_alive():
            self._exporter.shutdown()  # it then gives up trying

    def _phases(
        self, parent: Span, index: int, completion: Completion, ended_ns: int, to_epoch_ns: int
    ) -> None:
        """A phase that the request did not come through has no span; the one in which it ended
        lasts until then."""
        context = set_span_in_context(parent)
        moments = [
            ("queue", completion.arrived_ns),
            ("prefill", completion.started_ns),
            ("decode", completion.first_token_ns),
        ]
        ends = [completion.started_ns, completion.first_token_ns, completion.last_token_ns]
        for (name, began_ns), until_ns in zip(moments, ends):
            if began_ns is None:
                return
            span = self._tracer.start_span(name, context=context, start_time=began_ns + to_epoch_ns)
            span.set_attribute("gen_ai.request.id", completion.request.request_id)
            span.set_attribute("dualray.completion", index)
            span.end((until_ns or ended_ns) + to_epoch_ns)


def attributes_of(ended: EndedRequest) -> Attributes:
    """Latencies are seconds; those of a moment that never came are left out."""
    _, service, method = ended.method.split("/", 2)
    attributes: Attributes = {
        "gen_ai.request.id": ended.request_id,
        "gen_ai.response.model": ended.model,
        "gen_ai.usage.prompt_tokens": ended.num_prompt_tokens,
        "gen_ai.usage.cached_tokens": ended.num_cached_tokens,
        "gen_ai.usage.completion_tokens": ended.num_output_tokens,
        "gen_ai.usage.num_sequences": len(ended.completions),
        "gen_ai.response.finish_reasons": list(ended.finish_reasons),
        "gen_ai.latency.e2e": _seconds(ended.arrived_ns, ended.ended_ns),
        "rpc.system": "grpc",
        "rpc.service": service,
        "rpc.method": method,
        "rpc.grpc.status_code": ended.code.value[0],
        "dualray.training_step": ended.weights.training_step,
        "dualray.weight_digest": ended.weights.digest,
        "dualray.num_preemptions": ended.num_preemptions,
    }
    if ended.code is not grpc.StatusCode.OK:
        attributes["error.type"] = ended.code.name
    if ended.completions:
        params = ended.completions[0].request.params
        attributes |= {
            "gen_ai.request.n": len(ended.completions),
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.top_k": params.top_k,
        }
    spans = {
        "time_in_queue": (ended.arrived_ns, ended.started_ns),
        "time_to_first_token": (ended.arrived_ns, ended.first_token_ns),
        "time_in_model_prefill": (ended.started_ns, ended.first_token_ns),
        "time_in_model_decode": (ended.first_token_ns, ended.last_token_ns),
        "time_in_model_inference": (ended.started_ns, ended.last_token_ns),
    }
    for name, (began_ns, until_ns) in spans.items():
        if began_ns is not None and until_ns is not None:
            attributes[f"gen_ai.latency.{name}"] = _seconds(began_ns, until_ns)
    return attributes


def _seconds(began_ns: int, until_ns: int) -> float:
    return (until_ns - began_ns) / 1e9
