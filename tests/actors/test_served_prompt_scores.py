"""`prompt_logprobs` over the wire: vLLM's shape, once per answer, whatever streams beside it."""

import json

import grpc
import pytest
from support.models import tiny_config, whole_model
from support.serving import serving

from dualray.actors.infer_messages import parse_call
from dualray.errors import RequestError
from dualray.inference.scoring import score
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

PROMPT = "To be, or not"


def call(stream=False, **sampling) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny")
    texts = {"text_input": PROMPT, "sampling_parameters": json.dumps({"max_tokens": 3} | sampling)}
    for name, value in texts.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    tensor = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    tensor.contents.bool_contents.append(stream)
    return request


def scores(response: pb.ModelInferResponse) -> list | None:
    """The decoded output, None where the message has none."""
    for tensor in response.outputs:
        if tensor.name == "prompt_logprobs":
            (text,) = tensor.contents.bytes_contents
            assert (tensor.datatype, list(tensor.shape)) == ("BYTES", [1])
            return json.loads(text)
    return None


@pytest.fixture(scope="module")
def stub():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(scope="module")
def expected() -> list[float]:
    stage = whole_model(tiny_config(vocab_size=257, num_nextn_predict_layers=0))
    return score(stage, [list(PROMPT.encode())])[0]


def test_they_are_what_dualray_score_says(stub, expected):
    scored = scores(stub.ModelInfer(call(prompt_logprobs=2)))
    assert scored is not None
    assert scored[0] is None
    for character, entry, value in zip(PROMPT[1:], scored[1:], expected, strict=True):
        told = entry[str(ord(character))]
        assert told["decoded_token"] == character
        assert told["logprob"] == pytest.approx(value, abs=1e-5)
        # The token itself, and two alternatives if it is none of them.
        assert len(entry) == (2 if told["rank"] <= 2 else 3)
        assert {1, 2} <= {e["rank"] for e in entry.values()}


def test_zero_tells_of_the_prompts_tokens_alone(stub, expected):
    scored = scores(stub.ModelInfer(call(prompt_logprobs="0")))
    values = [entry[str(ord(c))]["logprob"] for c, entry in zip(PROMPT[1:], scored[1:])]
    assert values == pytest.approx(expected, abs=1e-5)
    assert all(len(entry) == 1 for entry in scored[1:])


def test_a_stream_has_them_once_and_n_completions_too(stub):
    for n in (1, 3):
        request = call(stream=True, n=n, seed=3, prompt_logprobs=1, ignore_eos=True)
        messages = [m.infer_response for m in stub.ModelStreamInfer(iter([request]))]
        told = [scored for m in messages if (scored := scores(m)) is not None]
        assert len(messages) > n
        assert [len(scored) for scored in told] == [len(PROMPT)]


def test_who_does_not_ask_gets_none(stub):
    assert scores(stub.ModelInfer(call())) is None


def test_asking_by_name_alone_is_refused():
    request = call()
    request.outputs.add(name="prompt_logprobs")
    with pytest.raises(RequestError) as raised:
        parse_call(request, one_answer=True)
    assert str(raised.value) == (
        "outputs.prompt_logprobs is asked for and the sampling parameter is not set; correct "
        "outputs.prompt_logprobs."
    )
