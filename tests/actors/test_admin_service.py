"""The admin service on its port: pauses, modes, weights and placement, and who may ask."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.admin import Admin, Run
from support.certificates import Authority
from support.secured import bearer, channel, request_of
from support.serving import Served, serving

from dualray.actors.admin_server import AdminServer
from dualray.actors.admin_service import ADMIN_SERVICE
from dualray.actors.engine_state import EngineState
from dualray.errors import ResourceError
from dualray.inference.serve_config import ServeConfig
from dualray.proto import admin_pb2 as pb
from dualray.proto import admin_pb2_grpc as pb_grpc
from dualray.proto import inference_pb2 as infer
from dualray.proto import inference_pb2_grpc as infer_grpc

CODE = grpc.StatusCode
TIMEOUT_S = 30.0
LONG = 40
"""Tokens of a completion that a test holds in the middle."""


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture
def admin(served) -> Iterator[Admin]:
    admin = Admin(served, ServeConfig(), Run())
    yield admin
    admin.close()


@pytest.fixture
def stub(admin) -> Iterator[pb_grpc.AdminStub]:
    with grpc.insecure_channel(admin.target) as opened:
        yield pb_grpc.AdminStub(opened)


class Stream:
    """A completion of a client's own thread, as it comes."""

    def __init__(self, served: Served) -> None:
        self._messages: queue.Queue[infer.ModelStreamInferResponse | None] = queue.Queue()
        message = request_of(b"abc")
        message.parameters["max_tokens"].int64_param = LONG
        message.parameters["ignore_eos"].bool_param = True
        message.parameters["seed"].int64_param = 3
        flag = message.inputs.add(name="stream", datatype="BOOL", shape=[1])
        flag.contents.bool_contents.append(True)
        for name in ("return_finish_reason", "return_num_output_tokens"):
            flag = message.inputs.add(name=name, datatype="BOOL", shape=[1])
            flag.contents.bool_contents.append(True)
        self._thread = threading.Thread(target=self._read, args=(served.target, message))
        self._thread.start()

    def _read(self, target: str, message: infer.ModelInferRequest) -> None:
        with grpc.insecure_channel(target) as opened:
            stub = infer_grpc.GRPCInferenceServiceStub(opened)
            for response in stub.ModelStreamInfer(iter([message]), timeout=TIMEOUT_S):
                self._messages.put(response)
        self._messages.put(None)

    def end(self) -> tuple[int, str]:
        """Tokens in all, and why the completion ended."""
        count, reason = 0, ""
        while (message := self._messages.get(timeout=TIMEOUT_S)) is not None:
            assert not message.error_message
            for tensor in message.infer_response.outputs:
                if tensor.name == "num_output_tokens":
                    count += tensor.contents.uint_contents[0]
                elif tensor.name == "finish_reason" and tensor.contents.bytes_contents[0]:
                    reason = tensor.contents.bytes_contents[0].decode()
        self._thread.join()
        return count, reason


def midway(served: Served) -> Stream:
    """A completion that is held behind its third step."""
    done = len(served.plans)

    def hold(plan, sampled):
        if len(served.plans) - done == 3:
            served.gate.clear()
        return sampled

    served.fault = hold
    stream = Stream(served)
    served.until(lambda: len(served.plans) - done == 3 and not served.gate.is_set())
    return stream


def code_of(call) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    trailer = dict(raised.value.trailing_metadata() or ())
    return raised.value.code(), raised.value.details(), trailer


def test_kept_requests_stand_still_and_go_on_to_the_same_end(served, stub) -> None:
    whole = Stream(served).end()
    assert whole == (LONG, "length")
    stream = midway(served)
    paused = stub.PauseGeneration.future(
        pb.PauseGenerationRequest(mode=pb.PAUSE_MODE_KEEP), timeout=TIMEOUT_S
    )
    served.until(lambda: served.engine.state is EngineState.HELD)
    served.hold(False)
    assert paused.result().num_requests == 1
    plans = len(served.plans)
    assert stub.GetMode(pb.GetModeRequest()).engine_state == "held"
    assert not stub.GetWeightVersion(pb.GetWeightVersionRequest()).serving
    with grpc.insecure_channel(served.target) as opened:
        infers = infer_grpc.GRPCInferenceServiceStub(opened)
        code, details, trailer = code_of(lambda: infers.ModelInfer(request_of(b"x")))
    assert code is CODE.UNAVAILABLE
    assert "does not serve now, it is held" in details
    assert (trailer["retry-after"], trailer["grpc-retry-pushback-ms"]) == ("30", "30000")
    assert len(served.plans) == plans
    stub.ResumeGeneration(pb.ResumeGenerationRequest())
    assert stream.end() == whole


@pytest.mark.parametrize("mode", [pb.PAUSE_MODE_ABORT, pb.PAUSE_MODE_UNSPECIFIED])
def test_aborted_requests_end_with_what_they_have(served, stub, mode) -> None:
    stream = midway(served)
    paused = stub.PauseGeneration.future(pb.PauseGenerationRequest(mode=mode), timeout=TIMEOUT_S)
    count, reason = stream.end()
    assert reason == "abort"
    assert 0 < count < LONG
    served.hold(False)
    assert paused.result().num_requests == 1


def test_requests_may_end_first(served, stub) -> None:
    stream = midway(served)
    paused = stub.PauseGeneration.future(
        pb.PauseGenerationRequest(mode=pb.PAUSE_MODE_WAIT), timeout=TIMEOUT_S
    )
    served.until(lambda: served.engine.state is EngineState.HELD)
    assert not paused.done()
    served.hold(False)
    assert stream.end() == (LONG, "length")
    assert paused.result().num_requests == 1


def test_modes_are_the_runs_own(admin, stub) -> None:
    answer = stub.SetMode(pb.SetModeRequest(mode=pb.MODE_PAUSE))
    assert (answer.mode, answer.switched, answer.step) == (pb.MODE_PAUSE, True, 7)
    assert (list(answer.sentences), answer.first_token_s) == (["done"], 0.25)
    assert not answer.HasField("drain_s")
    assert stub.GetMode(pb.GetModeRequest()) == pb.GetModeResponse(
        mode=pb.MODE_PAUSE, run_state="serving", engine_state="serving", step=7
    )
    refused = code_of(lambda: stub.SetMode(pb.SetModeRequest(mode=pb.MODE_TRAIN)))
    assert refused[:2] == (CODE.FAILED_PRECONDITION, "run tiny has no steps left; serve on.")
    assert admin.run.asked == ["pause", "train"]
    admin.run.mode = ""
    assert stub.GetMode(pb.GetModeRequest()).mode == pb.MODE_UNSPECIFIED


def test_a_value_that_is_none_is_the_callers_mistake(stub) -> None:
    assert code_of(lambda: stub.SetMode(pb.SetModeRequest()))[:2] == (
        CODE.INVALID_ARGUMENT,
        "mode is 0 and must be TRAIN (1), SERVE (2) or PAUSE (3); name the mode that the run shall "
        "be in.",
    )
    request = pb.PauseGenerationRequest.FromString(b"\x08\x63")
    assert code_of(lambda: stub.PauseGeneration(request))[:2] == (
        CODE.INVALID_ARGUMENT,
        "mode is 99 and must be ABORT (1), WAIT (2) or KEEP (3); leave it out for ABORT.",
    )


def test_weights_and_placement(served, stub) -> None:
    wanted = pb.GetWeightVersionResponse(
        model="tiny", training_step=7, digest="abc123", serving=True
    )
    assert stub.GetWeightVersion(pb.GetWeightVersionRequest()) == wanted
    layers = stub.GetExpertPlacement(pb.GetExpertPlacementRequest()).layers
    assert [
        (each.layer, [(list(rank.experts), rank.num_homes) for rank in each.ranks])
        for each in layers
    ] == [(1, [([0, 1], 2), ([2, 3], 2)]), (4, [([2, 0, 1], 2), ([1, 3], 2)])]
    served.call(served.engine.drain())
    wanted.serving = False
    assert stub.GetWeightVersion(pb.GetWeightVersionRequest()) == wanted
    refused = code_of(lambda: stub.PauseGeneration(pb.PauseGenerationRequest()))
    assert refused[0] is CODE.UNAVAILABLE
    refused = code_of(lambda: stub.ResumeGeneration(pb.ResumeGenerationRequest()))
    assert refused[0] is CODE.UNAVAILABLE


def test_without_a_run_there_are_no_modes(served) -> None:
    admin = Admin(served, ServeConfig(), None)
    try:
        with grpc.insecure_channel(admin.target) as opened:
            stub = pb_grpc.AdminStub(opened)
            for call in (
                lambda: stub.SetMode(pb.SetModeRequest(mode=pb.MODE_SERVE)),
                lambda: stub.GetMode(pb.GetModeRequest()),
                lambda: stub.GetExpertPlacement(pb.GetExpertPlacementRequest()),
            ):
                assert code_of(call)[0] is CODE.UNIMPLEMENTED
            assert stub.GetWeightVersion(pb.GetWeightVersionRequest()).training_step == 7
    finally:
        admin.close()


def test_it_has_the_main_ports_tls_and_tokens_of_its_own(served, tmp_path) -> None:
    ca = Authority(tmp_path, "ca")
    server, client = ca.issue("server"), ca.issue("client")
    (tmp_path / "tokens").write_text("for-text\nfor-both\n")
    (tmp_path / "admin").write_text("a-token\nfor-both\n")
    config = ServeConfig(
        admin_port=0, admin_tokens_file=str(tmp_path / "admin"),
        tls_cert=str(server.cert), tls_key=str(server.key), tls_client_ca=str(ca.cert),
        tokens_file=str(tmp_path / "tokens"),
    )  # fmt: skip
    admin = Admin(served, config, Run())

    def asks(opened, metadata=()):
        return pb_grpc.AdminStub(opened).GetMode(
            pb.GetModeRequest(), metadata=metadata, timeout=TIMEOUT_S
        )

    try:
        with channel(admin.target, ca.cert, client) as opened:
            assert asks(opened, bearer("a-token")).run_state == "serving"
            assert asks(opened, bearer("for-both")).run_state == "serving"
            assert code_of(lambda: asks(opened, bearer("for-text")))[:2] == (
                CODE.PERMISSION_DENIED,
                "the call's bearer token may ask the model but not for this; use one of the admin "
                "service's.",
            )
            assert code_of(lambda: asks(opened))[0] is CODE.UNAUTHENTICATED
            assert code_of(lambda: asks(opened, bearer("b-token")))[0] is CODE.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(opened)
            status = health.Check(health_pb2.HealthCheckRequest(service=ADMIN_SERVICE)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        with channel(admin.target, ca.cert) as opened:
            assert code_of(lambda: asks(opened, bearer("a-token")))[0] is CODE.UNAVAILABLE
        with channel(admin.target) as opened:
            assert code_of(lambda: asks(opened, bearer("a-token")))[0] is CODE.UNAVAILABLE
    finally:
        admin.close()


def test_reflection_names_the_service(admin) -> None:
    with grpc.insecure_channel(admin.target) as opened:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reflected = reflection_pb2_grpc.ServerReflectionStub(opened)
        [response] = reflected.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S)
    names = {service.name for service in response.list_services_response.service}
    assert ADMIN_SERVICE in names


def test_a_port_in_use_is_a_sentence(served, admin) -> None:
    port = int(admin.target.rpartition(":")[2])

    async def second() -> None:
        await AdminServer(served.engine, ServeConfig()).start("127.0.0.1", port)

    with pytest.raises(ResourceError) as raised:
        served.call(second())
    assert str(raised.value) == (
        f"serve.admin_port is {port} and 127.0.0.1:{port} cannot be listened on, it is taken by "
        "another process or not this machine's; choose another serve.admin_port, or 0 for a free "
        "one."
    )


def test_malformed_bytes_are_refused(admin) -> None:
    with grpc.insecure_channel(admin.target) as opened:
        call = opened.unary_unary(f"/{ADMIN_SERVICE}/SetMode")
        assert code_of(lambda: call(b"\x0a\xff", timeout=TIMEOUT_S))[0] is CODE.INVALID_ARGUMENT


def test_refusals_of_a_training_model_say_when_to_come_again(served) -> None:
    served.call(served.engine.drain())
    message = request_of(b"x")
    with grpc.insecure_channel(served.target) as opened:
        stub = infer_grpc.GRPCInferenceServiceStub(opened)
        code, _, trailer = code_of(lambda: stub.ModelInfer(message, timeout=TIMEOUT_S))
        assert code is CODE.UNAVAILABLE
        assert (trailer["retry-after"], trailer["dualray-model"]) == ("30", "tiny")
        call = stub.ModelStreamInfer(iter([message]), timeout=TIMEOUT_S)
        [response] = list(call)
        assert response.error_message.startswith("UNAVAILABLE: ")
        assert dict(call.trailing_metadata())["grpc-retry-pushback-ms"] == "30000"
        served.call(served.engine.serve(served.engine.weights))
        answered = stub.ModelInfer.with_call(message, timeout=TIMEOUT_S)[1]
        assert "retry-after" not in dict(answered.trailing_metadata())


def test_who_is_cut_off_by_a_drain_is_told_when_to_come_again(served) -> None:
    served.hold()
    message = request_of(b"x")
    with grpc.insecure_channel(served.target) as opened:
        stub = infer_grpc.GRPCInferenceServiceStub(opened)
        call = stub.ModelInfer.future(message, timeout=TIMEOUT_S)
        served.until(lambda: served.engine.scheduler.num_running == 1)
        draining = served.begin(served.engine.drain(EngineState.STOPPED, 0.05))
        code, details, trailer = code_of(call.result)
        assert (code, trailer["retry-after"]) == (CODE.UNAVAILABLE, "30")
        assert "did not end within 0.05 s" in details
        served.hold(False)
        assert draining.result(TIMEOUT_S) == 1
