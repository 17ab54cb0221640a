"""Which tokens may be chosen, and what becomes of prompts that are too long: over the wire."""

import dataclasses
import json
import math

import grpc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.serving import LIMITS, serving

from dualray.actors.bad_words import bad_word_ids
from dualray.data.tokenizer import ByteTokenizer, train_bpe
from dualray.inference.adjust import adjust
from dualray.inference.plan import Owner, PromptScored
from dualray.inference.request import SamplingParams
from dualray.inference.token_history import TokenHistory
from dualray.inference.token_masks import ids_in
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc


def call(prompt="ab", **sampling) -> pb.ModelInferRequest:
    values = {"max_tokens": 40, "seed": 1} | sampling
    request = pb.ModelInferRequest(model_name="tiny")
    for name, value in {"text_input": prompt, "sampling_parameters": json.dumps(values)}.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    flags = {"exclude_input_in_output": True, "return_num_input_tokens": True}
    for name, value in flags.items():
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(value)
    return request


def text(response: pb.ModelInferResponse) -> str:
    (tensor,) = [t for t in response.outputs if t.name == "text_output"]
    return tensor.contents.bytes_contents[0].decode()


def num_input_tokens(response: pb.ModelInferResponse) -> int:
    (tensor,) = [t for t in response.outputs if t.name == "num_input_tokens"]
    return tensor.contents.uint_contents[0]


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served
        served.until(lambda: served.engine.scheduler.num_running == 0)
        assert served.engine.scheduler.free_blocks() == {Owner(0, 0, 0): LIMITS.num_blocks}


@pytest.fixture(scope="module")
def stub(served):
    with grpc.insecure_channel(served.target) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_only_allowed_tokens_are_chosen(stub):
    said = text(stub.ModelInfer(call(allowed_token_ids=[*b"abc"])))
    assert len(said) == 40
    assert set(said) == set("abc")
    assert text(stub.ModelInfer(call(allowed_token_ids=[ord("x")], max_tokens=3))) == "xxx"


def test_a_ban_gives_way_where_nothing_else_is_allowed(stub):
    assert text(stub.ModelInfer(call(allowed_token_ids=[*b"ab"], bad_words=["ab", "aa"]))) != ""
    request = call(allowed_token_ids=[*b"ab"], bad_words=["a"], max_tokens=9)
    assert text(stub.ModelInfer(request)) == "b" * 9
    request = call(allowed_token_ids=[256, *b"a"], bad_words=["a"], min_tokens=5, max_tokens=5)
    assert text(stub.ModelInfer(request)) == "a" * 5
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(allowed_token_ids=[256], min_tokens=5))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "min_tokens is 5 and must be 0" in raised.value.details()


def test_bad_words_are_not_said(stub):
    free = text(stub.ModelInfer(call(allowed_token_ids=[*b"ab"])))
    assert "aa" in free
    assert "bbb" in free
    held = text(stub.ModelInfer(call(allowed_token_ids=[*b"ab"], bad_words=["aa", "bbb"])))
    assert len(held) == 40
    assert "aa" not in held
    assert "bbb" not in held
    # They may begin in the prompt: what counts is said by the completion.
    assert text(stub.ModelInfer(call("a", allowed_token_ids=[ord("a")], bad_words=["aa"]))) != ""


def test_the_end_of_a_long_prompt_is_kept(stub):
    long = "x" * 100 + "abcdefgh"
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(long))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    cut = stub.ModelInfer(call(long, truncate_prompt_tokens=8))
    assert num_input_tokens(cut) == 8
    assert text(cut) == text(stub.ModelInfer(call("abcdefgh")))
    assert num_input_tokens(stub.ModelInfer(call("abc", truncate_prompt_tokens="8"))) == 3
    # As many as leave room for max_tokens in the context of 64.
    assert num_input_tokens(stub.ModelInfer(call(long, truncate_prompt_tokens=-1))) == 24


def test_special_tokens_are_text_on_request(stub):
    values = {"allowed_token_ids": [256], "ignore_eos": True, "max_tokens": 2}
    assert text(stub.ModelInfer(call(**values))) == ""
    shown = text(stub.ModelInfer(call(**values, skip_special_tokens=False)))
    assert shown == "<|endoftext|>" * 2


def test_a_prompt_without_numbers_is_our_fault(served, stub):
    def spoil(plan, outcomes):
        return [
            dataclasses.replace(
                part, tokens=tuple(dataclasses.replace(t, logprob=math.nan) for t in part.tokens)
            )
            if isinstance(part, PromptScored)
            else part
            for part in outcomes
        ]

    served.fault = spoil
    try:
        with pytest.raises(grpc.RpcError) as raised:
            stub.ModelInfer(call(prompt_logprobs=0))
    finally:
        served.fault = None
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "NaN" in raised.value.details()


def test_a_bad_word_is_read_as_it_begins_a_text_and_behind_a_space():
    assert bad_word_ids(["ab", " ab"], ByteTokenizer()) == (tuple(b"ab"),)
    tokenizer = train_bpe(["the cat the cat the hat the"] * 4, 265)
    found = {tokenizer.decode(ids) for ids in bad_word_ids(["the", "cat"], tokenizer)}
    assert found == {"the", " the", "cat", " cat"}
    assert all(len(ids) == 1 for ids in bad_word_ids(["the"], tokenizer))


def test_only_the_last_token_of_a_bad_word_is_banned_and_only_behind_the_others():
    history = TokenHistory(SamplingParams(), [1, 2], bad_words=((1, 2, 3), (7,)))

    def banned() -> set[int]:
        change = history.adjustment(())
        assert change is not None
        return set(change.banned_ids)

    assert banned() == {7}  # the prompt's 1, 2 do not count
    for token, expected in ((1, {7}), (2, {3, 7}), (9, {7}), (1, {7}), (1, {7}), (2, {3, 7})):
        history.add(token)
        assert banned() == expected
    later = history.after(3)
    assert later.adjustment(()) is not None
    assert banned() == {3, 7}
    allowed = TokenHistory(SamplingParams(allowed_token_ids=(3, 7)), [], bad_words=((7,),))
    change = allowed.adjustment(())
    assert change is not None
    assert list(ids_in(change.allowed)) == [3]


def test_bad_words_give_way_before_the_tokens_that_would_end_a_completion_too_soon():
    params = SamplingParams(allowed_token_ids=(5, 7), stop_token_ids=(5,), min_tokens=3)
    history = TokenHistory(params, [], bad_words=((7,),))
    change = history.adjustment(params.stop_token_ids)
    assert change is not None
    assert list(ids_in(change.allowed)) == [7]
    logits = torch.zeros(1, 8)
    free = TokenHistory(SamplingParams(), [], bad_words=((3,), (4,), (6,)))
    change = free.adjustment((0, 1, 2, 5, 7, 5, 3))
    assert change is not None
    assert change.banned_ids == (0, 1, 2, 5, 7, 3, 4, 6)
    adjust(logits, [(0, change)])
    assert logits.isfinite().nonzero().tolist() == [[0, 6]]


@given(
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=4),
    said=st.lists(st.integers(0, 2), max_size=12),
)
def test_bad_ends_are_those_of_comparing_all(words, said):
    history = TokenHistory(SamplingParams(), [1], bad_words=words)
    for token in said:
        history.add(token)
    behind = {tuple(said[begin:]) for begin in range(len(said) + 1)}
    change = history.adjustment(())
    expected = {word[-1] for word in words if word[:-1] in behind}
    assert set(change.banned_ids if change else ()) == expected
