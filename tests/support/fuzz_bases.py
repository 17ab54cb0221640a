"""Good messages of every method of every service, from which hostile ones are made."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import message_factory, symbol_database
from grpc_health.v1 import health_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from dualray.actors.admin_service import ADMIN_SERVICE
from dualray.actors.grpc_server import SERVICE
from dualray.actors.vllm_service import VLLM_SERVICE
from dualray.proto import admin_pb2 as admin
from dualray.proto import inference_pb2 as pb


def request(**parameters: int) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="tiny", id="a")
    text = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hello")
    for name, value in ({"max_tokens": 3} | parameters).items():
        message.parameters[name].int64_param = value
    return message


def long() -> pb.ModelInferRequest:
    """Several of them do not fit into the cache together."""
    message = request(max_tokens=50, n=4)
    message.parameters["ignore_eos"].bool_param = True
    return message


def with_json() -> pb.ModelInferRequest:
    message = request()
    tensor = message.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b'{"temperature": 0, "stop": ["x"]}')
    message.outputs.add(name="logprobs")
    return message


def held() -> pb.ModelInferRequest:
    """To a schema, whose text a change is likely to spoil."""
    message = request(max_tokens=12)
    tensor = message.inputs.add(name="sampling_parameters", datatype="BYTES", shape=[1])
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    text = json.dumps({"structured_outputs": {"json": schema}, "prompt_logprobs": 1})
    tensor.contents.bytes_contents.append(text.encode())
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


INFER = (request(), request(n=2, seed=5), long(), with_json(), held(), raw())
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
    f"/{ADMIN_SERVICE}/PauseGeneration": tuple(
        admin.PauseGenerationRequest(mode=mode) for mode in admin.PauseMode.values()
    ),
    f"/{ADMIN_SERVICE}/SetMode": tuple(admin.SetModeRequest(mode=m) for m in admin.Mode.values()),
    "/grpc.health.v1.Health/Check": (health_pb2.HealthCheckRequest(service=SERVICE),),
}
SERVICES = (SERVICE, VLLM_SERVICE, ADMIN_SERVICE, "grpc.health.v1.Health")
ENDLESS = "/grpc.health.v1.Health/Watch"


def methods() -> dict[str, tuple[Any, ...]]:
    """By method; an empty message where there is none better."""
    found = {}
    for name in SERVICES:
        for method in symbol_database.Default().pool.FindServiceByName(name).methods:
            empty = message_factory.GetMessageClass(method.input_type)()
            path = f"/{name}/{method.name}"
            found[path] = BASES.get(path, (empty,))
    del found[ENDLESS]
    assert set(BASES) <= set(found), "a method of BASES is misspelt"
    return found
