"""The served protocol over plain gRPC: answers, refusals, failures, and the services beside it."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.serving import LIMITS, Served, serving

from dualray.actors.grpc_server import SERVICE, InferenceServer
from dualray.actors.infer_messages import Answer, parse_call
from dualray.errors import RequestError, ResourceError
from dualray.inference.plan import Owner
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

OWNER = Owner(0, 0, 0)


def call(**changes) -> pb.ModelInferRequest:
    """A request with typed contents; `sampling` in the message's own parameters."""
    request = pb.ModelInferRequest(model_name="tiny", id=changes.pop("id", ""))
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(changes.pop("prompt", "ab").encode())
    for name in [n for n, v in changes.items() if isinstance(v, bool)]:
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(changes.pop(name))
    for name, value in changes.items():
        request.parameters[name].string_param = str(value)
    return request


@pytest.fixture
def stub(request):
    """Stub of whichever server the test uses."""
    name = "served" if "served" in request.fixturenames else "shared"
    with grpc.insecure_channel(request.getfixturevalue(name).target) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_requests_that_arrive_together_are_decoded_in_one_step(served, stub):
    served.hold()
    prompts = {"1": "a", "2": "bc"}
    requests = [
        call(id=i, prompt=p, stream=True, max_tokens=4, ignore_eos="true")
        for i, p in prompts.items()
    ]
    answers = stub.ModelStreamInfer(iter(requests))
    served.until(
        lambda: served.engine.scheduler.num_running + served.engine.scheduler.num_waiting == 2
    )
    served.hold(False)
    finished = [
        a.infer_response.id
        for a in answers
        if a.infer_response.parameters["triton_final_response"].bool_param
    ]
    assert sorted(finished) == ["1", "2"]
    together = [len(plan.sequences(OWNER)) for plan in served.plans]
    # The first may have left alone before the second was read; four steps each otherwise.
    assert together.count(2) >= 3
    assert len(served.plans) <= 5


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (call(stream=True), "stream is true and ModelInfer gives one answer; use ModelStreamInfer"),
        (
            call(n=2, temperature=0),
            "sampling_parameters.n is 2 and must be 1 at temperature 0; correct n.",
        ),
        (
            call(prompt="a", timeout="soon"),
            "parameters.timeout is soon and it is a positive number of microseconds",
        ),
        (
            pb.ModelInferRequest(model_name="tiny"),
            "text_input is missing and every request needs one",
        ),
        (
            pb.ModelInferRequest(model_name="tiny", inputs=[{"name": "text", "datatype": "BYTES"}]),
            "inputs.text is unknown and known are text_input, stream",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [2]}],
            ),
            "text_input is of shape [2] and its shape is [1]",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
                raw_input_contents=[b"\2\0\0\0\xff\xfe"],
            ),
            "text_input is no UTF-8 at byte 0 and text must be UTF-8",
        ),
        (
            pb.ModelInferRequest(
                model_name="tiny",
                inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1]}],
                raw_input_contents=[b"\x09\0\0\0ab"],
            ),
            "text_input is 6 bytes long and a string is its length in 4 bytes, then it",
        ),
    ],
)
def test_malformed_messages_are_refused_with_their_field(stub, shared, request_, sentence):
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request_)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith(sentence)


@pytest.mark.parametrize(
    "sampling", ["[" * 100_000, '{"top_k": ' + "9" * 5000 + "}"], ids=["deep", "long"]
)
def test_json_that_python_cannot_read_is_the_callers_fault(sampling):
    request = call()
    tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(sampling.encode())
    with pytest.raises(RequestError, match=r"^sampling_parameters is no JSON that can be read"):
        parse_call(request, one_answer=True)


@pytest.mark.parametrize("sampling", ['{"\\ud800": 1}', '{"stop": [' + '"", ' * 9000 + '""]}'])
def test_a_refusal_that_quotes_the_request_still_arrives(stub, shared, sampling):
    request = call()
    tensor = request.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(sampling.encode())
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details().startswith("sampling_parameters.")
    (answer,) = stub.ModelStreamInfer(iter([request]))
    assert answer.error_message == f"INVALID_ARGUMENT: {raised.value.details()}"


def test_our_own_bug_is_internal_and_leaves_no_blocks_behind(served, stub, monkeypatch):
    def broken(self, delta):
        raise KeyError("oops")

    monkeypatch.setattr(Answer, "message", broken)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call())
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert raised.value.details() == "the server failed with KeyError; see the engine's log."
    (answer,) = stub.ModelStreamInfer(iter([call(stream=True, max_tokens=50)]))
    assert answer.error_message == f"INTERNAL: {raised.value.details()}"
    served.until(lambda: served.engine.scheduler.num_running == 0)
    assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}


def test_every_answer_says_which_weights_gave_it(stub, shared):
    response, finished = stub.ModelInfer.with_call(call(max_tokens=2, temperature="0"))
    trailer = dict(finished.trailing_metadata())
    assert trailer["dualray-model"] == "tiny"
    assert trailer["dualray-training-step"] == "7"
    assert trailer["dualray-weight-digest"] == "abc123"
    assert response.parameters["training_step"].int64_param == 7
    assert response.parameters["weight_digest"].string_param == "abc123"
    # Typed contents are answered with typed contents.
    assert response.outputs[0].contents.bytes_contents[0].startswith(b"ab")
    assert not response.raw_output_contents


def test_a_request_without_an_end_gets_the_servers_time_limit():
    with serving(max_request_s=0.2) as served, grpc.insecure_channel(served.target) as channel:
        served.hold()
        with pytest.raises(grpc.RpcError) as raised:
            pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(call())
        served.hold(False)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_full_queue_refuses(served, stub):
    served.hold()
    count = LIMITS.max_batch + LIMITS.max_waiting
    futures = [stub.ModelInfer.future(call(max_tokens=60)) for _ in range(count)]
    # The step in flight holds the one that came first; the others wait for its end.
    served.until(lambda: served.engine.scheduler.num_waiting == LIMITS.max_waiting)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call())
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for future in futures:
        future.cancel()
    served.until(lambda: served.engine.scheduler.num_waiting == 0)
    served.hold(False)


def test_health_follows_the_engine():
    served = Served()
    try:
        with grpc.insecure_channel(served.target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            stub = pb_grpc.GRPCInferenceServiceStub(channel)

            def check(service):
                status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
                return health_pb2.HealthCheckResponse.ServingStatus.Name(status)

            assert (check(""), check(SERVICE)) == ("SERVING", "NOT_SERVING")
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(call())
            assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert not stub.ServerReady(pb.ServerReadyRequest()).ready
            watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
            statuses = (response.status for response in watch)
            assert next(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
            served.serve()
            assert next(statuses) == health_pb2.HealthCheckResponse.SERVING
            served.call(served.engine.drain())
            assert next(statuses) == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelInfer(call())
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert raised.value.details() == (
                "model tiny does not serve now, it is training; watch the health service and "
                "try again."
            )
    finally:
        served.close()


def test_a_lost_worker_fails_the_requests_and_the_health(served, stub):
    def lose(plan, sampled):
        raise RuntimeError("connection reset by peer\nand more")

    served.fault = lose
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call())
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert raised.value.details() == (
        "the workers failed in step 1: RuntimeError: connection reset by peer; see the run's log."
    )
    assert not stub.ServerReady(pb.ServerReadyRequest()).ready


def test_nan_fails_its_request_only(served, stub):
    def poison(plan, sampled):
        names = [s.request_id for s in plan.sequences(OWNER) if len(s.ids) == 3]
        return [
            type(s)(request_id=s.request_id, token_id=0, logprob=float("nan"), rank=1)
            if s.request_id in names
            else s
            for s in sampled
        ]

    served.fault = poison
    good = stub.ModelInfer.future(call(prompt="ab", max_tokens=3))
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(prompt="abc"))
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert good.result().outputs[0].name == "text_output"


def test_reflection_names_the_services(shared):
    with grpc.insecure_channel(shared.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([ask]))
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_a_port_in_use_is_a_sentence(shared):
    port = int(shared.target.rpartition(":")[2])

    async def second():
        await InferenceServer(shared.engine).start("127.0.0.1", port)

    with pytest.raises(ResourceError) as raised:
        shared.call(second())
    assert str(raised.value) == (
        f"serve.port is {port} and 127.0.0.1:{port} cannot be listened on, it is taken by "
        "another process or not this machine's; choose another serve.port, or 0 for a free one."
    )
