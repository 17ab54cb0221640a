"""`structured_outputs` as callers write it: vLLM's keys, and a sentence for what is wrong."""

import pytest

from dualray.errors import RequestError
from dualray.inference.request import SamplingParams
from dualray.inference.structured_outputs import StructuredOutputs


def parsed(value) -> StructuredOutputs | None:
    return SamplingParams.parse({"structured_outputs": value}).structured_outputs


def test_each_kind_of_constraint():
    assert parsed(None) is None
    assert parsed({"regex": "a+"}) == StructuredOutputs(regex="a+")
    assert parsed({"choice": ["a", "b"]}) == StructuredOutputs(choice=("a", "b"))
    assert parsed({"grammar": "start: /a/"}) == StructuredOutputs(grammar="start: /a/")
    assert parsed({"json_object": True}) == StructuredOutputs(json_object=True)
    assert parsed({"regex": ""}) == StructuredOutputs(regex="")


def test_a_schema_is_an_object_or_text():
    schema = {"type": "string", "maxLength": 3}
    assert parsed({"json": schema}) == parsed({"json": '{"type": "string", "maxLength": 3}'})
    assert parsed({"json": True}) == StructuredOutputs(json="true")


def test_all_of_it_may_be_text_and_nulls_ask_for_nothing():
    assert parsed('{"regex": "a+", "json": null}') == StructuredOutputs(regex="a+")
    neutral = {"structural_tag": None, "disable_additional_properties": False}
    assert parsed({"regex": "a", "json_object": "false"} | neutral) == parsed({"regex": "a"})


def test_white_space_of_json():
    wanted = parsed({"json_object": True, "whitespace_pattern": " ?"})
    assert wanted == StructuredOutputs(json_object=True, whitespace_pattern=" ?")
    wanted = parsed({"json": {}, "disable_any_whitespace": True})
    assert wanted == StructuredOutputs(json="{}", disable_any_whitespace=True)


NAME = "sampling_parameters.structured_outputs"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (
            {},
            f"{NAME} has no constraint and must have exactly one; set one of json, regex, "
            "choice, grammar, json_object.",
        ),
        (
            {"regex": "a", "choice": ["a"]},
            f"{NAME} has regex and choice and must have exactly one; set one of json, regex, "
            "choice, grammar, json_object.",
        ),
        (
            {"regexp": "a"},
            f"{NAME}.regexp is no constraint; did you mean regex?",
        ),
        (
            {"structural_tag": "{}"},
            f"{NAME}.structural_tag is {{}} and this server does not offer it; correct "
            "structured_outputs.structural_tag.",
        ),
        (
            {"json": "{"},
            f"{NAME}.json is 1 characters and must be JSON; correct structured_outputs.json.",
        ),
        (
            {"json": [1]},
            f"{NAME}.json is [1] and must be a JSON Schema; correct structured_outputs.json.",
        ),
        (
            {"json": {"const": float("nan")}},
            f"{NAME}.json is a schema and must be JSON of finite numbers, nested less deeply; "
            "correct structured_outputs.json.",
        ),
        (
            {"regex": 3},
            f"{NAME}.regex is 3 and must be a string; correct structured_outputs.regex.",
        ),
        (
            {"choice": []},
            f"{NAME}.choice is [] and must have at least one string; correct "
            "structured_outputs.choice.",
        ),
        (
            {"regex": "a" * 70_000},
            f"{NAME} is 70000 bytes long and must be at most 65536; correct structured_outputs.",
        ),
        (
            3,
            f'{NAME} is 3 and must be an object such as {{"regex": "a+"}}; correct '
            "structured_outputs.",
        ),
        (
            "[" * 100_000,
            f"{NAME} is 100000 characters and must be JSON; correct structured_outputs.",
        ),
    ],
)
def test_a_wrong_value_is_refused(value, sentence):
    with pytest.raises(RequestError) as raised:
        parsed(value)
    assert str(raised.value) == sentence


def test_what_vllm_had_before_is_named():
    with pytest.raises(RequestError) as raised:
        SamplingParams.parse({"guided_decoding": {"regex": "a"}})
    assert str(raised.value).endswith("does not offer guided_decoding; use structured_outputs.")


def test_allowed_ids_are_no_grammar():
    with pytest.raises(RequestError) as raised:
        SamplingParams.parse({"structured_outputs": {"regex": "a"}, "allowed_token_ids": [3]})
    assert str(raised.value) == (
        "sampling_parameters.allowed_token_ids is [3] and cannot be combined with "
        "structured_outputs; correct allowed_token_ids."
    )
