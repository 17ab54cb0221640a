"""Every field of a GenerateRequest is read or refused."""

import dataclasses
import math

import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb

from dualray.actors import vllm_requests
from dualray.actors.refusals import NotOfferedError, status_of
from dualray.actors.vllm_requests import read_request
from dualray.errors import RequestError
from dualray.inference.request import SamplingParams
from dualray.inference.sampling_parsers import NOT_OFFERED

CONTEXT = 64


def read(**fields):
    return read_request(pb.GenerateRequest(**{"text": "a"} | fields), CONTEXT)


def params(**fields):
    return read(sampling_params=pb.SamplingParams(**fields)).params


def test_zeros_without_presence_ask_for_the_defaults():
    for unset in (read().params, params(), params(top_p=0, n=0, repetition_penalty=0, top_k=0)):
        assert unset == SamplingParams(max_tokens=CONTEXT)


def test_fields_with_presence_mean_their_zeros():
    assert params(temperature=0).temperature == 0
    assert params(logprobs=0).logprobs == 0
    assert params(seed=0).seed == 0
    with pytest.raises(RequestError, match="max_tokens is 0 and must be at least 1"):
        params(max_tokens=0)


def test_every_number_arrives():
    assert params(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-1,
        presence_penalty=1.5,
        repetition_penalty=2,
        max_tokens=9,
        min_tokens=2,
        stop=["x", "yz"],
        stop_token_ids=[4, 5],
        ignore_eos=True,
        n=3,
        logprobs=2,
        seed=-1,
        include_stop_str_in_output=True,
        logit_bias={3: -100, 4: 1.5},
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        grammar_from_first_token=True,
    ) == SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-1.0,
        presence_penalty=1.5,
        repetition_penalty=2.0,
        max_tokens=9,
        min_tokens=2,
        stop=("x", "yz"),
        stop_token_ids=(4, 5),
        ignore_eos=True,
        n=3,
        logprobs=2,
        seed=-1,
        include_stop_str_in_output=True,
        logit_bias=((3, -100.0), (4, 1.5)),
    )


def test_every_sampling_parameter_of_the_protocol_is_known(monkeypatch):
    """Each reaches `SamplingParams.parse` under a name that it knows, or changes no id."""
    given = {}
    monkeypatch.setattr(
        vllm_requests.SamplingParams, "parse", lambda values: given.update(values) or None
    )
    choices = pb.ChoiceConstraint(choices=["a", "b"])
    constraints = {
        "json_schema": ("{}", {"json": "{}"}),
        "regex": ("a+", {"regex": "a+"}),
        "grammar": ("root", {"grammar": "root"}),
        "structural_tag": ("{}", {"structural_tag": "{}"}),
        "json_object": (True, {"json_object": True}),
        "choice": (choices, {"choice": ["a", "b"]}),
    }
    for name, (value, ours) in constraints.items():
        params(**{name: value})
        assert given.pop("structured_outputs") == ours
    params(prompt_logprobs=0, truncate_prompt_tokens=-1)
    assert (given["prompt_logprobs"], given["truncate_prompt_tokens"]) == (0, -1)
    monkeypatch.undo()
    known = {*NOT_OFFERED, *(field.name for field in dataclasses.fields(SamplingParams))}
    ours = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} - set(constraints)
    assert ours - set(vllm_requests._NO_EFFECT) <= known


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_transfer_params": pb.KvTransferParams(remote_port=1)},
        {"kv_transfer_params_json": "{}"},
        {"mm_inputs": pb.MultimodalInputs()},
        {"extra_mm_inputs": [pb.MultimodalInputs()]},
        {"media_refs": pb.MediaRefs()},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_not_offered_is_refused(fields):
    name = next(iter(fields))
    with pytest.raises(NotOfferedError) as caught:
        read(**fields)
    assert str(caught.value) == (
        f"{name} is set and this server does not offer it; leave {name} out."
    )
    assert status_of(caught.value).name == "UNIMPLEMENTED"


def test_every_field_of_the_protocol_is_read_or_refused():
    refused = {"kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "extra_mm_inputs"}
    known = {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    assert known == set(vllm_requests._READ) | refused | {"media_refs"}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_p": math.nan}, "sampling_parameters.top_p is nan and must be a finite number"),
        ({"n": 2, "temperature": 0}, "sampling_parameters.n is 2 and must be 1 at temperature 0"),
        ({"logprobs": -1}, "sampling_parameters.logprobs is -1 and must lie between 0 and 20"),
        (
            {"logit_bias": {-1: 1}},
            "sampling_parameters.logit_bias is {-1: 1.0} and must not contain a negative id",
        ),
        (
            {"truncate_prompt_tokens": -3},
            "sampling_parameters.truncate_prompt_tokens is -3 and must be -1 or at least 1",
        ),
        (
            {"min_tokens": 65},
            "sampling_parameters.min_tokens is 65 and must lie between 0 and max_tokens, which "
            "is 64",
        ),
    ],
)
def test_wrong_parameters(fields, sentence):
    with pytest.raises(RequestError) as caught:
        params(**fields)
    assert caught.value.sentence == sentence


def test_prompts_are_text_or_ids():
    assert read(text="ab").prompt == "ab"
    ids = pb.TokenizedInput(original_text="not read", input_ids=[1, 2])
    assert read_request(pb.GenerateRequest(tokenized=ids), CONTEXT).prompt == (1, 2)
    with pytest.raises(RequestError, match="input is missing and every request needs a prompt"):
        read_request(pb.GenerateRequest(), CONTEXT)


def test_there_is_one_rank():
    assert read(data_parallel_rank=0).prompt == "a"
    with pytest.raises(RequestError, match="data_parallel_rank is 1 and this server has rank 0"):
        read(data_parallel_rank=1)
