"""Bytes that are no message: the caller's mistake in every method, whatever its kind."""

import grpc
import pytest
from support.serving import serving

from dualray.proto import inference_pb2 as pb

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
METHODS = [
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelReady",
    STREAM,
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
CORRUPT, BAD_UTF8 = b"\xff\xff\xff", b"\x0a\x02\xc3\x28"


@pytest.fixture(scope="module")
def channel():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        yield channel


@pytest.mark.parametrize(
    ("data", "why"),
    [(CORRUPT, "Wire format was corrupt"), (BAD_UTF8, "String field had bad UTF-8")],
)
@pytest.mark.parametrize("method", METHODS)
def test_it_is_invalid_and_says_why(channel, method, data, why):
    with pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(method)(iter([data]), timeout=30))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert why in caught.value.details()
    assert caught.value.details().endswith("; send what the method's proto says.")


def test_messages_before_it_on_a_stream_are_answered(channel):
    good = pb.ModelInferRequest(model_name="tiny")
    good.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(
        b"hello"
    )
    read = pb.ModelStreamInferResponse.FromString
    call = channel.stream_stream(STREAM)(iter([good.SerializeToString(), BAD_UTF8]), timeout=30)
    answer = read(next(call))
    assert answer.error_message == ""
    assert answer.infer_response.parameters["triton_final_response"].bool_param
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
