"""Traces of requests, received by a collector that speaks OTLP over gRPC as real ones do."""

import socket
import subprocess
import sys
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from support.questions import question
from support.secured import bearer, channel, stream
from support.serving import serving

from dualray.actors.request_records import RequestRecords
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig
from dualray.proto import inference_pb2_grpc as pb_grpc

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
PHASES = ["queue", "prefill", "decode"]


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.resources: list[dict] = []
        self.spans: list = []
        self._server = grpc.server(futures.ThreadPoolExecutor(1))
        otlp_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):  # noqa: N802 (the protocol's name)
        for resource in request.resource_spans:
            self.resources.append(attributes(resource.resource))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def named(self, name: str) -> list:
        return [span for span in self.spans if span.name == name]

    def children(self, parent) -> list:
        """By when they began."""
        found = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def close(self) -> None:
        self._server.stop(None).wait()


def attributes(holder) -> dict:
    values = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = (
            [item.string_value for item in value.values] if kind == "array_value" else value
        )
    return values


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


def traced(flags: str = "01"):
    """The metadata of a caller that traces, and records if the flags are 01."""
    return (("traceparent", f"00-{TRACE}-{PARENT}-{flags}"), ("tracestate", "vendor=1"))


def test_a_request_is_a_span_below_its_callers_with_its_phases_below_it(collector):
    with (
        serving(security=ServeConfig(otlp_endpoint=collector.endpoint)) as served,
        channel(served.target) as opened,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        asked = question(b"abc", "mine", max_tokens=4, temperature=0.5, top_p=0.9, top_k=7)
        stub.ModelInfer(asked, metadata=traced())
    [span] = collector.named("llm_request")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.kind, span.trace_state) == (span.SPAN_KIND_SERVER, "vendor=1")
    assert span.status.code == span.status.STATUS_CODE_UNSET
    said = attributes(span)
    latencies = {k: said.pop(k) for k in list(said) if k.startswith("gen_ai.latency.")}
    assert said == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.cached_tokens": 0,
        "gen_ai.usage.completion_tokens": 4,
        "gen_ai.usage.num_sequences": 1,
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "dualray.training_step": 7,
        "dualray.weight_digest": "abc123",
        "dualray.num_preemptions": 0,
    }
    phases = collector.children(span)
    assert [phase.name for phase in phases] == PHASES
    assert {phase.trace_id.hex() for phase in phases} == {TRACE}
    # Where one phase ends the next begins, the first with the request.
    moments = [span.start_time_unix_nano]
    for phase in phases:
        moments += [phase.start_time_unix_nano, phase.end_time_unix_nano]
    moments.append(span.end_time_unix_nano)
    assert moments == sorted(moments)
    assert moments[2] == moments[3]
    assert moments[4] == moments[5]
    queue, prefill, decode = (p.end_time_unix_nano - p.start_time_unix_nano for p in phases)
    name = "gen_ai.latency.{}".format
    # Epoch nanoseconds are whole numbers of 61 bits; as seconds the differences are exact enough.
    assert latencies[name("time_in_model_prefill")] == pytest.approx(prefill / 1e9, abs=1e-9)
    assert latencies[name("time_in_model_decode")] == pytest.approx(decode / 1e9, abs=1e-9)
    assert latencies[name("time_in_model_inference")] == pytest.approx((prefill + decode) / 1e9)
    assert latencies[name("time_in_queue")] >= queue / 1e9
    assert latencies[name("time_to_first_token")] == pytest.approx(
        latencies[name("time_in_queue")] + prefill / 1e9, abs=1e-9
    )
    whole = span.end_time_unix_nano - span.start_time_unix_nano
    assert latencies[name("e2e")] == pytest.approx(whole / 1e9, abs=1e-9)
    assert len(latencies) == 6
    [resource] = collector.resources
    assert resource["service.name"] == "dualray"


def test_every_message_of_a_stream_and_every_completion_has_its_own(collector):
    with (
        serving(security=ServeConfig(otlp_endpoint=collector.endpoint)) as served,
        channel(served.target) as opened,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        asked = [question(b"ab", "one", max_tokens=2), question(b"cd", "two", n=3, max_tokens=2)]
        assert list(stub.ModelStreamInfer(iter(asked)))
    spans = {attributes(span)["gen_ai.request.id"]: span for span in collector.named("llm_request")}
    assert spans.keys() == {"one", "two"}
    assert spans["one"].trace_id != spans["two"].trace_id
    assert not any(span.parent_span_id for span in spans.values()), "nobody called on their behalf"
    assert attributes(spans["two"])["gen_ai.response.finish_reasons"] == ["length"] * 3
    phases = collector.children(spans["two"])
    indices = sorted((attributes(p)["dualray.completion"], p.name) for p in phases)
    assert indices == sorted((i, name) for i in range(3) for name in PHASES)


def test_refused_and_failed_requests_are_traced_and_strangers_are_not(collector, tmp_path):
    (tmp_path / "tokens").write_text("valid\n")
    config = ServeConfig(otlp_endpoint=collector.endpoint, tokens_file=str(tmp_path / "tokens"))
    with serving(security=config) as served, channel(served.target) as opened:
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        stream(opened)
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(question(b"x", "hot", temperature=-1), metadata=bearer("valid"))

        def lose(plan, sampled):
            raise ConnectionError("gone")

        served.fault = lose
        with pytest.raises(grpc.RpcError):
            stub.ModelInfer(question(b"x", "lost"), metadata=bearer("valid"))
    refused, lost = collector.named("llm_request")
    assert attributes(refused)["error.type"] == "INVALID_ARGUMENT"
    assert refused.status.code == refused.status.STATUS_CODE_UNSET, "the caller's mistake"
    assert collector.children(refused) == []
    assert attributes(lost)["error.type"] == "UNAVAILABLE"
    assert lost.status.code == lost.status.STATUS_CODE_ERROR
    # It came as far as its first step, and ended in it.
    assert [phase.name for phase in collector.children(lost)] == PHASES[:2]


def test_what_the_caller_does_not_record_is_not_recorded(collector):
    with (
        serving(security=ServeConfig(otlp_endpoint=collector.endpoint)) as served,
        channel(served.target) as opened,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(opened)
        stub.ModelInfer(question(b"a", "no"), metadata=traced("00"))
        stub.ModelInfer(question(b"a", "yes"), metadata=traced("01"))
        stub.ModelInfer(question(b"a", "odd"), metadata=(("traceparent", "nonsense"),))
    spans = collector.named("llm_request")
    assert [attributes(span)["gen_ai.request.id"] for span in spans] == ["yes", "odd"]
    assert not spans[1].parent_span_id
    assert len(collector.spans) == 2 + 2 * len(PHASES)


def test_a_collector_that_is_away_costs_no_request():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with (
            serving(security=ServeConfig(otlp_endpoint=endpoint)) as served,
            channel(served.target) as opened,
        ):
            stub = pb_grpc.GRPCInferenceServiceStub(opened)
            assert stub.ModelInfer(question(b"ab", max_tokens=2)).outputs


def test_without_the_exporter_the_setting_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "dualray.actors.tracing", raising=False)
    config = ServeConfig(otlp_endpoint="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"OpenTelemetry's exporter is not .*dualray\[otel\]"):
        RequestRecords(None, config)


def test_a_server_that_traces_nothing_loads_nothing_of_it():
    code = "import sys, dualray.actors.grpc_server; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "dualray.actors.request_records" in loaded.stdout.split()
    assert not [name for name in loaded.stdout.split() if name.startswith("opentelemetry")]
