"""Hostile messages to every method: refusals, never our own failure, and no block is lost.

`make fuzz` sends 100,000; here it is as many as a test may take. The last line says how many were
sent, what they were answered with and how many blocks stayed taken.
"""

import os
import sys
from collections import Counter
from typing import Any

import grpc
from google.protobuf import message_factory, symbol_database
from grpc_health.v1 import health_pb2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm
from support.hostile import hostile
from support.serving import serving

from dualray.actors.grpc_server import SERVICE
from dualray.actors.vllm_service import VLLM_SERVICE
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


def sampling(**values) -> vllm.SamplingParams:
    """As gateways send them: every field that has no presence is set."""
    given = {"top_p": 1.0, "repetition_penalty": 1.0, "n": 1, "skip_special_tokens": True} | values
    return vllm.SamplingParams(**given)


INFER = (request(), request(n=2, seed=5), with_json(), raw())
GENERATE = (
    vllm.GenerateRequest(text="hello", sampling_params=sampling(max_tokens=3)),
    vllm.GenerateRequest(text="hello", stream=True, sampling_params=sampling(max_tokens=3, n=2)),
    vllm.GenerateRequest(
        request_id="a",
        tokenized=vllm.TokenizedInput(input_ids=[5, 6, 7]),
        sampling_params=sampling(max_tokens=2, temperature=0.5, logprobs=2, prompt_logprobs=1),
    ),
    vllm.GenerateRequest(text="yes or no", sampling_params=sampling(max_tokens=4, regex="(a|b)+")),
)
BASES = {
    f"/{SERVICE}/ModelInfer": INFER,
    f"/{SERVICE}/ModelStreamInfer": (*INFER, streamed()),
    f"/{SERVICE}/ModelReady": (pb.ModelReadyRequest(name="tiny"),),
    f"/{SERVICE}/ModelMetadata": (pb.ModelMetadataRequest(name="tiny", version="7"),),
    f"/{SERVICE}/ModelConfig": (pb.ModelConfigRequest(name="tiny"),),
    f"/{SERVICE}/ModelStatistics": (pb.ModelStatisticsRequest(name="tiny"),),
    f"/{SERVICE}/RepositoryIndex": (pb.RepositoryIndexRequest(ready=True),),
    f"/{VLLM_SERVICE}/Generate": GENERATE,
    f"/{VLLM_SERVICE}/Abort": (vllm.AbortRequest(request_ids=["a"]),),
    "/grpc.health.v1.Health/Check": (health_pb2.HealthCheckRequest(service=SERVICE),),
}
ENDLESS = "/grpc.health.v1.Health/Watch"


def methods() -> dict[str, tuple[Any, ...]]:
    """Good messages of every method that the server has; an empty one where there is no better."""
    found = {}
    for name in (SERVICE, VLLM_SERVICE, "grpc.health.v1.Health"):
        for method in symbol_database.Default().pool.FindServiceByName(name).methods:
            empty = message_factory.GetMessageClass(method.input_type)()
            path = f"/{name}/{method.name}"
            found[path] = BASES.get(path, (empty,))
    del found[ENDLESS]
    assert set(BASES) <= set(found), "a method of BASES is misspelt"
    return found


METHODS = methods()
BIDIRECTIONAL = {f"/{SERVICE}/ModelStreamInfer"}
ANSWERED_BY_STREAMS = {
    f"/{VLLM_SERVICE}/{name}" for name in ("Generate", "GetTokenizer", "SubscribeKvEvents")
}

# Most messages go where most can go wrong.
DEEP = [m for m in METHODS if m.endswith(("/ModelInfer", "/ModelStreamInfer", "/Generate"))]
calls = st.sampled_from([*METHODS, *DEEP * 8]).flatmap(
    lambda method: st.tuples(
        st.just(method), hostile(METHODS[method]), st.sampled_from([None] * 7 + ["cancel"])
    )
)


def start(channel: grpc.Channel, method: str, data: bytes, timeout_s: float):
    if method in ANSWERED_BY_STREAMS:
        return channel.unary_stream(method)(data, timeout=timeout_s)
    if method in BIDIRECTIONAL:
        return channel.stream_stream(method)(iter([data]), timeout=timeout_s)
    return channel.unary_unary(method).future(data, timeout=timeout_s)


def outcome(method: str, call) -> str:
    """The call's code; the code inside a stream's error message where it has one."""
    try:
        if method not in BIDIRECTIONAL | ANSWERED_BY_STREAMS:
            call.result()
            return "OK"
        found = "OK"
        for data in call:
            if method in ANSWERED_BY_STREAMS:
                continue
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
