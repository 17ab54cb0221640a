"""gRPC calls in the metrics, and the Grafana dashboard that shows all of them."""

import json
import re
from importlib.resources import files

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.scrapes import scraping

from dualray.platform.client import Client
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc


@pytest.fixture
def scrape(served):
    with scraping(served) as scrape:
        yield scrape


def question(prompt) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(prompt.encode())
    return request


def test_grpc_calls_are_counted_by_code(served, scrape):
    with grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(2):
            stub.ServerLive(pb.ServerLiveRequest())
        with pytest.raises(grpc.RpcError):
            stub.ModelMetadata(pb.ModelMetadataRequest(name="other"))
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/no.Such/Method")(b"")
        assert list(stub.ModelStreamInfer(iter([question("ab")])))
        served.hold()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        next(watch)
        assert scrape().calls("started")["server_stream", "Watch"] == 1
        assert ("server_stream", "Watch", "Canceled") not in scrape().calls("handled")
        watch.cancel()
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(question("ab"), timeout=2.0)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        answer = scrape()
        # The server hears of what its callers gave up after they did.
        while sum(answer.calls("handled").values()) < sum(answer.calls("started").values()):
            answer = scrape()
        served.hold(False)
    assert answer.calls("started")["unary", "ServerLive"] == 2
    handled = answer.calls("handled")
    assert handled["unary", "ServerLive", "OK"] == 2
    assert handled["unary", "ModelMetadata", "NotFound"] == 1
    assert handled["bidi_stream", "ModelStreamInfer", "OK"] == 1
    assert handled["server_stream", "Watch", "Canceled"] == 1
    # Both sides have a clock, and the caller's may be the first to cancel.
    late = {code for kind, method, code in handled if (kind, method) == ("unary", "ModelInfer")}
    assert late in ({"DeadlineExceeded"}, {"Canceled"})
    assert sum(handled.values()) == sum(answer.calls("started").values()) == 6


def test_the_dashboard_shows_what_is_exported_and_nothing_else(served, scrape):
    with Client(served.target) as client:  # calls have series once there are any
        assert list(client.generate("ab", {"max_tokens": 3, "ignore_eos": True, "seed": 1}))
    text = files("dualray.k8s").joinpath("grafana_dashboard.json").read_text()
    dashboard = json.loads(text)
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    shown = {m for q in queries for m in re.findall(r"\b(?:vllm:|dualray:|grpc_server_)\w+", q)}
    answer = scrape()
    families = {f for f in answer.families if not f.endswith("_created")}
    # What has a series for each layer or place has none yet, in a model that has no such thing.
    later = {"dualray:expert_balancedness", "vllm:spec_decode_num_accepted_tokens_per_pos_total"}
    assert later <= shown
    assert shown - later <= {s.name for s in answer.samples}
    assert {re.sub("_(total|bucket|sum|count)$", "", name) for name in shown} == families
    used = {label for q in queries for label in re.findall(r"by \((\w+)\)", q)}
    assert used <= {label for s in answer.samples for label in s.labels} | {"position"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
