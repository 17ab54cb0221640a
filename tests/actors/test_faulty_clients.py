"""Clients that read slowly or go away: they hold up nobody and keep no blocks."""

import grpc
import pytest
from support.serving import serving

from dualray.inference.serve_config import ServeConfig
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

TIMEOUT_S = 60


def request(max_tokens: int, n: int = 1, logprobs: bool = False) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="tiny")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hello")
    stream = message.inputs.add(name="stream", datatype="BOOL", shape=[1])
    stream.contents.bool_contents.append(True)
    message.outputs.add(name="num_output_tokens")
    values = {"max_tokens": max_tokens, "n": n, "seed": 3, "ignore_eos": True}
    if logprobs:
        values["logprobs"] = 20
        message.outputs.add(name="logprobs")  # for their size
    for name, value in values.items():
        if isinstance(value, bool):
            message.parameters[name].bool_param = value
        else:
            message.parameters[name].int64_param = value
    return message


def stream(channel, message):
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    return stub.ModelStreamInfer(iter([message]), timeout=TIMEOUT_S)


def alive(channel, timeout_s: float) -> bool:
    stub = pb_grpc.GRPCInferenceServiceStub(channel)
    return stub.ServerLive(pb.ServerLiveRequest(), timeout=timeout_s).live


def tokens(answers) -> int:
    """Tokens over all completions of a call, which must have gone well."""
    total = 0
    for answer in answers:
        assert answer.error_message == ""
        outputs = {output.name: output.contents for output in answer.infer_response.outputs}
        total += sum(outputs["num_output_tokens"].uint_contents)
    return total


def test_a_slow_reader_holds_up_nobody_and_misses_nothing(served):
    n, length = 8, 50
    free = served.engine.scheduler.free_blocks()
    with grpc.insecure_channel(served.target) as slow, grpc.insecure_channel(served.target) as fast:
        unread = stream(slow, request(length, n=n, logprobs=True))
        # More than HTTP/2 lets a server send to who does not read; the engine goes on.
        served.until(lambda: served.engine.stats.num_succeeded == n)
        assert served.engine.scheduler.free_blocks() == free
        assert tokens(stream(fast, request(4))) == 4
        assert tokens(unread) == n * length


def test_a_client_that_goes_away_gives_its_blocks_back_at_once(served):
    free = served.engine.scheduler.free_blocks()
    channel = grpc.insecure_channel(served.target)

    def stay_in_step_four(plan, outcomes):
        if len(served.plans) == 4:
            served.gate.clear()
        return outcomes

    served.fault = stay_in_step_four
    call = stream(channel, request(50))
    served.until(lambda: not served.gate.is_set())
    next(call)
    assert served.engine.scheduler.free_blocks() != free
    channel.close()
    served.until(lambda: served.engine.scheduler.free_blocks() == free)
    served.hold(False)
    with grpc.insecure_channel(served.target) as other:
        assert tokens(stream(other, request(4))) == 4


def test_a_connection_has_as_many_calls_open_as_it_may():
    with (
        serving(security=ServeConfig(max_streams=2)) as served,
        grpc.insecure_channel(served.target) as channel,
        grpc.insecure_channel(
            served.target, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as other,
    ):
        scheduler = served.engine.scheduler
        served.hold()
        open_calls = [stream(channel, request(4)) for _ in range(2)]
        served.until(lambda: scheduler.num_running + scheduler.num_waiting == 2)
        with pytest.raises(grpc.RpcError) as caught:
            alive(channel, timeout_s=1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert alive(other, timeout_s=TIMEOUT_S)
        served.hold(False)
        assert [tokens(call) for call in open_calls] == [4, 4]
        assert alive(channel, timeout_s=TIMEOUT_S)
