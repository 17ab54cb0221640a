"""`n` above 1: several completions of one prompt in one call."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from support.serving import LIMITS, serving

from dualray.inference.plan import Owner
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

OWNER = Owner(0, 0, 0)
SAMPLING = {"max_tokens": 6, "seed": 11, "ignore_eos": True}
FLAGS = (
    "return_finish_reason",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
)


def call(prompt="ab", stream=False, **sampling) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="tiny")
    texts = {"text_input": prompt, "sampling_parameters": json.dumps(SAMPLING | sampling)}
    for name, value in texts.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    flags = dict.fromkeys(FLAGS, True) | {"stream": stream, "exclude_input_in_output": True}
    for name, value in flags.items():
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(value)
    return request


def outputs(response: pb.ModelInferResponse) -> dict[str, list]:
    values = {}
    for tensor in response.outputs:
        contents = tensor.contents
        if tensor.datatype == "BYTES":
            values[tensor.name] = [item.decode() for item in contents.bytes_contents]
        else:
            values[tensor.name] = list(contents.uint_contents or contents.fp32_contents)
        assert list(tensor.shape) == [len(values[tensor.name])]
    return values


@pytest.fixture
def served():
    with serving() as served:
        yield served
        served.until(lambda: served.engine.scheduler.num_running == 0)
        assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}


@pytest.fixture
def stub(served):
    with grpc.insecure_channel(served.target) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_one_answer_has_an_element_for_each(stub):
    several = outputs(stub.ModelInfer(call(n=3)))
    singles = [outputs(stub.ModelInfer(call(seed=11 + i))) for i in range(3)]
    assert len(set(several["text_output"])) == 3
    for name in ("text_output", "finish_reason", "num_output_tokens"):
        assert several[name] == [single[name][0] for single in singles], name
    ids = [[list(token) for token in json.loads(item)] for item in several["logprobs"]]
    assert ids == [[list(t) for t in json.loads(s["logprobs"][0])] for s in singles]
    # Matrix products of three rows and of one differ in their rounding.
    total = [s["cumulative_logprob"][0] for s in singles]
    assert several["cumulative_logprob"] == pytest.approx(total, rel=1e-5)
    assert several["num_input_tokens"] == [2]


def test_a_stream_gives_the_same_piece_by_piece(stub):
    whole = outputs(stub.ModelInfer(call(n=3)))
    messages = [m.infer_response for m in stub.ModelStreamInfer(iter([call(n=3, stream=True)]))]
    pieces = [outputs(message) for message in messages]
    for index in range(3):
        text = "".join(piece["text_output"][index] for piece in pieces)
        assert text == whole["text_output"][index]
        assert sum(piece["num_output_tokens"][index] for piece in pieces) == 6
        reasons = [piece["finish_reason"][index] for piece in pieces]
        assert sorted(reasons)[-2:] == ["", "length"]
        tokens = [t for piece in pieces for t in json.loads(piece["logprobs"][index])]
        assert tokens == json.loads(whole["logprobs"][index])
    assert pieces[-1]["cumulative_logprob"] == whole["cumulative_logprob"]
    final = [m.parameters["triton_final_response"].bool_param for m in messages]
    assert final == [False] * (len(messages) - 1) + [True]


def test_tritonclient_reads_them(served):
    peer = Path(__file__).with_name("triton_peer.py")
    command = [sys.executable, str(peer), "several", served.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["streamed"] == answer["whole"]
    assert len(set(answer["whole"])) == 3
    assert answer["counts"] == [6, 6, 6]


def test_completions_end_on_their_own(stub):
    """A stop string ends those that say it; the others go on."""
    texts = outputs(stub.ModelInfer(call(n=4, max_tokens=10)))["text_output"]
    stop = next(c for c in texts[0] if not all(c in text for text in texts))
    response = stub.ModelInfer(call(n=4, max_tokens=10, stop=stop))
    ended = outputs(response)
    assert ended["text_output"] == [text.split(stop)[0] for text in texts]
    stopped = [i for i, text in enumerate(texts) if stop in text]
    assert [i for i, r in enumerate(ended["finish_reason"]) if r == "stop"] == stopped
    for i in stopped:
        assert response.parameters[f"matched_stop_{i}"].string_param == stop


def test_cancelling_the_stream_cancels_all(served, stub):
    stream = stub.ModelStreamInfer(iter([call(n=3, stream=True, max_tokens=50)]))
    next(stream)
    served.hold()
    stream.cancel()
    served.until(lambda: served.engine.scheduler.num_running == 0)
    assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
    served.hold(False)


def test_all_are_taken_or_none(served, stub):
    scheduler = served.engine.scheduler
    served.hold()
    one = stub.ModelInfer.future(call())
    served.until(lambda: scheduler.num_running == 1)
    three = stub.ModelInfer.future(call(n=3))
    served.until(lambda: scheduler.num_waiting == 3)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(n=LIMITS.max_waiting - 2))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert scheduler.num_waiting == 3
    served.hold(False)
    assert [len(outputs(f.result())["text_output"]) for f in (one, three)] == [1, 3]
    assert len(outputs(stub.ModelInfer(call(n=LIMITS.max_waiting)))["text_output"]) == 8


def test_more_than_may_wait_are_never_taken(stub):
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(n=LIMITS.max_waiting + 1))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.details() == (
        "sampling_parameters.n is 9 and must be at most serve.max_waiting, which is 8; correct n."
    )


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_fails_fails_the_call_and_frees_the_others(served, stub, stream):
    def nan_in_the_second(plan, sampled):
        if plan.step < 3:
            return sampled
        return [replace(s, logprob=float("nan")) if s.request_id == "2" else s for s in sampled]

    served.fault = nan_in_the_second
    if stream:
        *_, last = stub.ModelStreamInfer(iter([call(n=3, stream=True, max_tokens=50)]))
        assert last.error_message.startswith("INTERNAL: the model gave NaN")
    else:
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(call(n=3, max_tokens=50))
        assert raised.value.code() is grpc.StatusCode.INTERNAL
    served.until(lambda: served.engine.scheduler.num_running == 0)
