"""Penalties and bias from the wire to the text, against completions made without any engine."""

import asyncio
import json

import grpc
import pytest
import torch
from support.models import tiny_config, training_context, whole_model
from support.serving import LIMITS, Served, serving

from dualray.data.tokenizer import ByteTokenizer
from dualray.inference.request import SamplingParams
from dualray.platform.client import Client
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

PROMPTS = ("abcabc", "zz", "hello hello")
PENALTIES = {
    "repetition_penalty": 1.7,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.9,
    "logit_bias": {"97": 0.7, "200": 1.5, "3": -100},
}


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


def slow_completion(prompt: str, sampling: dict, max_tokens: int) -> tuple[int, ...]:
    """Greedy ids: the training forward over the whole text for each token, and plain loops."""
    stage = whole_model(tiny_config(vocab_size=257, num_nextn_predict_layers=0))
    prompt_ids = list(ByteTokenizer().encode(prompt))
    output: list[int] = []
    for _ in range(max_tokens):
        ids = prompt_ids + output
        ctx = training_context(stage.config, (len(ids),))
        with torch.no_grad():
            logits_V = stage.logits(stage(stage.embed(torch.tensor(ids), ctx), ctx)[-1:], ctx)[0]
        scores = logits_V.tolist()
        for token, bias in sampling.get("logit_bias", {}).items():
            scores[int(token)] += bias
        for token in set(ids):
            penalty = sampling.get("repetition_penalty", 1.0)
            scores[token] *= 1 / penalty if scores[token] > 0 else penalty
        for token in output:
            scores[token] -= sampling.get("frequency_penalty", 0.0)
        for token in set(output):
            scores[token] -= sampling.get("presence_penalty", 0.0)
        output.append(scores.index(max(scores)))
    return tuple(output)


def complete(served: Served, prompts, **values) -> list[tuple[int, ...]]:
    """Token ids of completions that run together."""

    async def ask():
        params = SamplingParams.parse({"max_tokens": 12, "ignore_eos": True} | values)
        completions = [served.engine.submit(prompt, params) for prompt in prompts]
        deltas = await asyncio.gather(*(c.whole() for c in completions))
        return [tuple(token.token_id for token in delta.tokens) for delta in deltas]

    return served.call(ask())


@pytest.mark.parametrize("names", [[name] for name in PENALTIES] + [[], list(PENALTIES)])
def test_a_greedy_completion_equals_the_slow_one(served, names):
    sampling = {name: PENALTIES[name] for name in names}
    expected = [slow_completion(prompt, sampling, 12) for prompt in PROMPTS]
    assert complete(served, PROMPTS, temperature=0, **sampling) == expected


def test_each_penalty_changes_the_completions(served):
    plain = complete(served, PROMPTS, temperature=0)
    for name, value in PENALTIES.items():
        assert complete(served, PROMPTS, temperature=0, **{name: value}) != plain, name


def test_neutral_values_change_nothing(served):
    neutral = {
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logit_bias": {"5": 0},
    }
    plain = complete(served, PROMPTS, seed=4)
    assert complete(served, PROMPTS, seed=4, **neutral) == plain


def test_a_seed_draws_the_same_beside_other_requests(served):
    together = complete(served, PROMPTS, seed=4, **PENALTIES)
    alone = [complete(served, [prompt], seed=4, **PENALTIES)[0] for prompt in PROMPTS]
    assert together == alone


def test_cancelling_one_leaves_the_other_its_own_counts(served):
    (expected,) = complete(served, PROMPTS[:1], temperature=0, **PENALTIES)

    async def ask():
        values = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
        params = SamplingParams.parse(values | PENALTIES)
        doomed = served.engine.submit(PROMPTS[1], params)
        kept = served.engine.submit(PROMPTS[0], params)
        async for _ in doomed:
            break
        doomed.cancel()
        later = served.engine.submit(PROMPTS[0], params)
        return [tuple(t.token_id for t in (await c.whole()).tokens) for c in (kept, later)]

    assert served.call(ask()) == [expected, expected]
    assert set(served.engine.scheduler.free_blocks().values()) == {LIMITS.num_blocks}


def test_clients_set_them_by_json_and_by_parameters_of_the_message(served):
    sampling = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "logit_bias": {"65": 100}}
    with Client(served.target) as client:
        assert "".join(client.generate("ab", sampling)) == "AAAAA"
        # The first A's own frequency now weighs more than its bias over B.
        sampling |= {"logit_bias": {"65": 100, "66": 99}, "frequency_penalty": 2}
        assert "".join(client.generate("ab", sampling)).count("B") >= 2
    request = pb.ModelInferRequest(model_name="tiny")
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"ab")
    for name, value in {"repetition_penalty": "2", "presence_penalty": "3"}.items():
        request.parameters[name].string_param = value
    with grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(request)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details() == (
            "sampling_parameters.presence_penalty is 3.0 and must lie between -2 and 2; "
            "correct presence_penalty."
        )
        request.parameters["presence_penalty"].string_param = "2"
        assert stub.ModelInfer(request).outputs[0].name == "text_output"


def test_a_biased_id_beyond_the_vocabulary_is_refused(served):
    sampling = json.dumps({"logit_bias": {"257": 1}})
    request = pb.ModelInferRequest(model_name="tiny")
    for name, value in {"text_input": "ab", "sampling_parameters": sampling}.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    with grpc.insecure_channel(served.target) as channel, pytest.raises(grpc.RpcError) as raised:
        pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must name ids below the vocabulary size 257" in raised.value.details()
