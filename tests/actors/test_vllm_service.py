"""vLLM's engine protocol with its own stubs, against a served tiny model."""

import json

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from support.holding import held
from support.secured import request_of
from support.serving import LIMITS, serving

from dualray.inference.plan import Owner
from dualray.proto import inference_pb2_grpc as triton_grpc

OWNER = Owner(0, 0, 0)
CODE = grpc.StatusCode
Z, EOS = 122, 256
ONLY_Z = {"logit_bias": {Z: 100}}


@pytest.fixture
def stub(request):
    """Stub of whichever server the test uses."""
    name = "served" if "served" in request.fixturenames else "shared"
    with grpc.insecure_channel(request.getfixturevalue(name).target) as channel:
        yield pb_grpc.VllmEngineStub(channel)


def request_for(prompt="ab", *, request_id="", stream=False, **sampling) -> pb.GenerateRequest:
    params = pb.SamplingParams(**{"max_tokens": 6, "seed": 3, "ignore_eos": True} | sampling)
    request = pb.GenerateRequest(request_id=request_id, stream=stream, sampling_params=params)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.input_ids.extend(prompt)
    return request


def chunks_of(responses, index=0):
    return [r.chunk for r in responses if r.HasField("chunk") and r.chunk.index == index]


def completes_of(responses):
    return [r.complete for r in responses if r.HasField("complete")]


def ids_by_the_other_protocol(target, prompt, **sampling) -> list[int]:
    """What the inference protocol says that the same request is answered with."""
    request = request_of(prompt.encode())
    for name, value in sampling.items():
        request.parameters[name].string_param = str(value)
    request.outputs.add(name="logprobs")
    with grpc.insecure_channel(target) as channel:
        response = triton_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    by_name = dict(zip((o.name for o in response.outputs), response.outputs))
    entries = json.loads(by_name["logprobs"].contents.bytes_contents[0])
    return [int(token) for entry in entries for token in entry]


def test_chunks_carry_what_is_new_and_one_message_the_whole(shared, stub):
    responses = list(stub.Generate(request_for("ab", stream=True, logprobs=2)))
    chunks = chunks_of(responses)
    (whole,) = completes_of(responses)
    assert responses[-1].complete == whole
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 6
    assert [chunk.completion_tokens for chunk in chunks] == [1] * 6
    assert {chunk.prompt_tokens for chunk in chunks} == {whole.prompt_tokens} == {2}
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert list(whole.output_ids) == ids
    assert (whole.completion_tokens, whole.finish_reason) == (6, "length")
    assert whole.WhichOneof("matched_stop") is None
    assert list(whole.output_logprobs.token_ids) == ids
    assert list(whole.output_logprobs.token_logprobs) == [
        value for chunk in chunks for value in chunk.output_logprobs.token_logprobs
    ]
    assert [list(top.token_ids) for top in whole.output_logprobs.top_logprobs] == [
        list(chunk.output_logprobs.top_logprobs[0].token_ids) for chunk in chunks
    ]
    assert all(len(top.values) == 2 for top in whole.output_logprobs.top_logprobs)
    expected = ids_by_the_other_protocol(
        shared.target, "ab", max_tokens=6, seed=3, ignore_eos="true"
    )
    assert ids == expected


def test_without_stream_only_the_whole_comes(stub, shared):
    (streamed,) = completes_of(stub.Generate(request_for("ab", stream=True)))
    (response,) = stub.Generate(request_for("ab"))
    assert response.complete == streamed
    assert not response.complete.HasField("output_logprobs")


def test_token_ids_are_as_good_as_text(stub, shared):
    (of_text,) = stub.Generate(request_for("ab"))
    (of_ids,) = stub.Generate(request_for([97, 98]))
    assert of_ids == of_text


def test_several_completions_have_an_index_each(stub, shared):
    responses = list(stub.Generate(request_for("ab", stream=True, n=3)))
    wholes = sorted(completes_of(responses), key=lambda whole: whole.index)
    assert [whole.index for whole in wholes] == [0, 1, 2]
    for whole in wholes:
        chunks = chunks_of(responses, whole.index)
        assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.output_ids)
        # Seeds count up from the request's own.
        (alone,) = stub.Generate(request_for("ab", seed=3 + whole.index))
        assert alone.complete.output_ids == whole.output_ids


def test_a_stop_string_is_named_and_its_ids_are_sent(stub, shared):
    responses = list(stub.Generate(request_for(stream=True, stop=["zzz"], **ONLY_Z)))
    (whole,) = completes_of(responses)
    assert list(whole.output_ids) == [Z] * 3
    assert (whole.finish_reason, whole.matched_stop_str) == ("stop", "zzz")
    assert [list(chunk.token_ids) for chunk in chunks_of(responses)] == [[Z]] * 3


def test_a_token_is_sent_while_its_text_may_still_be_a_stop_string(served, stub):
    served.fault = lambda plan, sampled: served.gate.clear() or sampled
    call = stub.Generate(request_for(stream=True, stop=["zzz"], **ONLY_Z), timeout=60)
    assert list(next(call).chunk.token_ids) == [Z]
    assert len(served.plans) == 1
    served.fault = None
    served.hold(False)
    assert completes_of(call)[0].matched_stop_str == "zzz"


def test_stop_tokens_are_named_and_the_end_of_a_text_is_not(stub, shared):
    (response,) = stub.Generate(request_for(stop_token_ids=[Z], **ONLY_Z))
    whole = response.complete
    assert (list(whole.output_ids), whole.finish_reason) == ([Z], "stop")
    assert whole.matched_token_id == Z
    (response,) = stub.Generate(request_for(ignore_eos=False, logit_bias={EOS: 100}))
    whole = response.complete
    assert (list(whole.output_ids), whole.finish_reason) == ([EOS], "stop")
    assert whole.WhichOneof("matched_stop") is None


def test_a_completion_without_max_tokens_fills_the_context(stub, shared):
    params = pb.SamplingParams(ignore_eos=True)
    (response,) = stub.Generate(pb.GenerateRequest(text="ab", sampling_params=params))
    whole = response.complete
    assert (whole.completion_tokens, whole.finish_reason) == (LIMITS.max_context - 2, "length")


def test_abort_ends_the_stream_and_frees_the_blocks(served, stub):
    served.hold()
    first = stub.Generate(request_for(request_id="first", stream=True, n=2), timeout=60)
    second = stub.Generate(request_for(request_id="second", stream=True), timeout=60)
    scheduler = served.engine.scheduler
    served.until(lambda: scheduler.num_running + scheduler.num_waiting == 3)
    stub.Abort(pb.AbortRequest(request_ids=["first", "unknown"]))
    wholes = completes_of(first)
    assert sorted((w.index, w.finish_reason) for w in wholes) == [(0, "abort"), (1, "abort")]
    assert first.code() is CODE.OK
    # The step that was held goes on with the other request alone.
    assert scheduler.num_running + scheduler.num_waiting == 1
    served.hold(False)
    (whole,) = completes_of(second)
    assert whole.finish_reason == "length"
    assert scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}


def test_what_was_made_before_an_abort_is_in_the_whole(served, stub):
    served.fault = lambda plan, sampled: served.gate.clear() or sampled
    call = stub.Generate(request_for(request_id="a", stream=True), timeout=60)
    token = next(call).chunk.token_ids
    stub.Abort(pb.AbortRequest(request_ids=["a"]))
    (whole,) = completes_of(call)
    assert (whole.output_ids, whole.finish_reason) == (token, "abort")
    assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}


def test_an_abort_does_not_wait_for_a_grammar(served, stub, monkeypatch):
    grammars = served.engine.grammars._grammars
    with held(grammars, "compile", monkeypatch) as begun:
        call = stub.Generate(request_for(request_id="a", n=2, regex="ab", stream=True), timeout=60)
        assert begun.wait(60)
        stub.Abort(pb.AbortRequest(request_ids=["a"]))
        wholes = completes_of(call)
    assert [(w.finish_reason, list(w.output_ids), w.prompt_tokens) for w in wholes] == [
        ("abort", [], 2)
    ] * 2
    assert served.plans == []


def test_a_name_is_taken_while_its_request_runs(served, stub):
    served.hold()
    first = stub.Generate(request_for(request_id="a"), timeout=60)
    served.until(lambda: served.engine.scheduler.num_running == 1)
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Generate(request_for(request_id="a")))
    assert raised.value.code() is CODE.INVALID_ARGUMENT
    assert raised.value.details() == (
        "request_id is 'a' and a request of that name still runs; give every request a name of "
        "its own."
    )
    served.hold(False)
    (response,) = first
    assert response == next(stub.Generate(request_for(request_id="a")))


def test_requests_without_a_name_do_not_meet(served, stub):
    served.hold()
    calls = [stub.Generate(request_for(), timeout=60) for _ in range(2)]
    scheduler = served.engine.scheduler
    served.until(lambda: scheduler.num_running + scheduler.num_waiting == 2)
    stub.Abort(pb.AbortRequest(request_ids=[""]))
    served.hold(False)
    assert [completes_of(call)[0].finish_reason for call in calls] == ["length"] * 2


def test_a_cancelled_call_frees_its_blocks(served, stub):
    served.hold()
    call = stub.Generate(request_for(stream=True, n=2))
    scheduler = served.engine.scheduler
    served.until(lambda: scheduler.num_running + scheduler.num_waiting == 2)
    call.cancel()
    served.until(lambda: scheduler.num_running + scheduler.num_waiting == 0)
    assert scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
    served.hold(False)
    assert len(list(stub.Generate(request_for()))) == 1


def test_a_call_without_a_deadline_has_the_servers_limit():
    with serving(max_request_s=0.2) as served, grpc.insecure_channel(served.target) as channel:
        served.hold()
        with pytest.raises(grpc.RpcError) as raised:
            list(pb_grpc.VllmEngineStub(channel).Generate(request_for(stream=True)))
        assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
        served.hold(False)
    assert raised.value.code() is CODE.DEADLINE_EXCEEDED


def test_workers_lost_in_mid_stream_are_unavailable(served, stub):
    def lose(plan, sampled):
        if len(served.plans) == 3:
            raise RuntimeError("a worker died")
        return sampled

    served.fault = lose
    call = stub.Generate(request_for(stream=True))
    received = []
    with pytest.raises(grpc.RpcError) as raised:
        received += call
    assert raised.value.code() is CODE.UNAVAILABLE
    assert raised.value.details().startswith("the workers failed in step 3")


@pytest.mark.parametrize(
    ("request_", "code", "sentence"),
    [
        (request_for(top_p=3), CODE.INVALID_ARGUMENT, "sampling_parameters.top_p is 3.0 and"),
        (pb.GenerateRequest(), CODE.INVALID_ARGUMENT, "input is missing and every request needs"),
        (request_for(""), CODE.INVALID_ARGUMENT, "text_input is empty and the model needs"),
        (
            pb.GenerateRequest(tokenized=pb.TokenizedInput()),
            CODE.INVALID_ARGUMENT,
            "input_ids is empty and the model needs at least one token to continue",
        ),
        (
            request_for([1, 257]),
            CODE.INVALID_ARGUMENT,
            "input_ids has token 257 and the vocabulary has the ids 0 to 256; use the tokenizer",
        ),
        (
            request_for([1] * 64),
            CODE.INVALID_ARGUMENT,
            "input_ids has 64 tokens and must leave room for one more in the context of 64",
        ),
        (
            pb.GenerateRequest(text="a", mm_inputs=pb.MultimodalInputs()),
            CODE.UNIMPLEMENTED,
            "mm_inputs is set and this server does not offer it",
        ),
    ],
)
def test_refusals_have_codes_and_sentences_and_say_who_refuses(
    shared, stub, request_, code, sentence
):
    call = stub.Generate(request_)
    with pytest.raises(grpc.RpcError):
        list(call)
    assert call.code() is code
    assert call.details().startswith(sentence)
    trailer = dict(call.trailing_metadata())
    assert trailer["dualray-model"] == "tiny"
    assert (trailer["dualray-training-step"], trailer["dualray-weight-digest"]) == ("7", "abc123")
