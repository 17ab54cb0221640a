"""Hostile messages to every method: refusals, never our own failure, and no block is lost.

`make fuzz` sends 100,000; here it is as many as a test may take. The last line says how many were
sent, what they were answered with and how many blocks stayed taken.
"""

import os
import sys
from collections import Counter

import grpc
import pytest
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.hostile import hostile
from support.serving import serving

from dualray.actors.grpc_server import SERVICE
from dualray.proto import inference_pb2 as pb

MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "2000"))
PER_EXAMPLE = 20
EXPECTED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
}


def request(**parameters: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="tiny", id="a")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hello")
    for name, value in ({"max_tokens": 3} | parameters).items():
        message.parameters[name].int64_param = value
    return message


def with_json() -> pb.ModelInferRequest:
    message = request()
    tensor = message.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b'{"temperature": 0, "stop": ["x"]}')
    message.outputs.add(name="logprobs")
    return message


def raw() -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="tiny")
    message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    message.raw_input_contents.append(b"\x02\x00\x00\x00ab")
    message.parameters["max_tokens"].int64_param = 2
    return message


def streamed() -> pb.ModelInferRequest:
    message = request(n=2)
    message.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(
        True
    )
    return message


INFER = (request(), request(n=2, seed=5), with_json(), raw())
SERVICE_METHODS = {
    "ModelInfer": INFER,
    "ModelStreamInfer": (*INFER, streamed()),
    "ServerLive": (pb.ServerLiveRequest(),),
    "ServerReady": (pb.ServerReadyRequest(),),
    "ModelReady": (pb.ModelReadyRequest(name="tiny"),),
    "ServerMetadata": (pb.ServerMetadataRequest(),),
    "ModelMetadata": (pb.ModelMetadataRequest(name="tiny", version="7"),),
    "ModelConfig": (pb.ModelConfigRequest(name="tiny"),),
    "ModelStatistics": (pb.ModelStatisticsRequest(name="tiny"),),
    "RepositoryIndex": (pb.RepositoryIndexRequest(ready=True),),
}
METHODS = {f"/{SERVICE}/{name}": bases for name, bases in SERVICE_METHODS.items()} | {
    "/grpc.health.v1.Health/Check": (health_pb2.HealthCheckRequest(service=SERVICE),),
}
STREAMING = {f"/{SERVICE}/ModelStreamInfer"}

# Most messages go where most can go wrong.
weights = [*METHODS, *[m for m in METHODS if "Infer" in m.rsplit("/", 1)[-1]] * 8]
calls = st.sampled_from(weights).flatmap(
    lambda method: st.tuples(
        st.just(method), hostile(METHODS[method]), st.sampled_from([None] * 7 + ["cancel"])
    )
)


def start(channel: grpc.Channel, method: str, data: bytes, timeout_s: float):
    if method in STREAMING:
        return channel.stream_stream(method)(iter([data]), timeout=timeout_s)
    return channel.unary_unary(method).future(data, timeout=timeout_s)


def outcome(method: str, call) -> str:
    """The call's code; the code inside a stream's error message where it has one."""
    try:
        if method not in STREAMING:
            call.result()
            return "OK"
        found = "OK"
        for data in call:
            message = pb.ModelStreamInferResponse.FromString(data).error_message
            if message:
                found = message.partition(":")[0]
        return found
    except grpc.RpcError as error:
        return error.code().name
    except grpc.FutureCancelledError:
        return "CANCELLED"


def test_hostile_messages_are_refused_and_leave_no_block_behind(capsys):
    codes: Counter[str] = Counter()
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        free = served.engine.scheduler.free_blocks()

        @settings(
            max_examples=max(1, MESSAGES // PER_EXAMPLE),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(calls, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
        def send(batch):
            running = [(m, data, start(channel, m, data, 60.0), how) for m, data, how in batch]
            for _, _, call, how in running:
                if how == "cancel":
                    call.cancel()
            for method, data, call, _ in running:
                code = outcome(method, call)
                codes[code] += 1
                assert code in EXPECTED, f"{method} answered {code} to {data!r}"

        send()
        served.until(lambda: not served.engine.scheduler.num_running)
        leaked = sum(free.values()) - sum(served.engine.scheduler.free_blocks().values())
        assert served.engine.scheduler.num_waiting == 0
    sent = sum(codes.values())
    with capsys.disabled():
        seen = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        sys.stdout.write(
            f"\nfuzz: messages tried {sent}, codes seen {seen}, blocks leaked {leaked}\n"
        )
    assert leaked == 0
    assert sent >= MESSAGES
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(codes)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_empty_message_is_answered(method):
    """Every method is reached: a misspelt name would be UNIMPLEMENTED forever."""
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        assert outcome(method, start(channel, method, b"", 30.0)) in ("OK", "NOT_FOUND")
