import pytest

from dualray.errors import RequestError
from dualray.inference.request import SamplingParams, check_prompt, check_token_ids


def test_defaults_are_vllms():
    params = SamplingParams.parse({})
    assert params == SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (
        16,
        0,
        None,
        None,
    )
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == ((), (), False)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert (params.repetition_penalty, params.logit_bias) == (1.0, ())


def test_numbers_may_come_as_strings():
    params = SamplingParams.parse(
        {"temperature": "0.5", "max_tokens": "7", "ignore_eos": "true", "seed": "3", "top_k": 4.0}
    )
    assert params == SamplingParams(temperature=0.5, max_tokens=7, ignore_eos=True, seed=3, top_k=4)


def test_stop_is_one_string_or_several():
    assert SamplingParams.parse({"stop": "a"}).stop == ("a",)
    assert SamplingParams.parse({"stop": ["a", "b"]}).stop == ("a", "b")
    assert SamplingParams.parse({"stop": None}).stop == ()


def test_biases_come_as_an_object_whose_keys_are_strings():
    params = SamplingParams.parse({"logit_bias": {"7": -100, "0": "2.5"}})
    assert params.logit_bias == ((7, -100.0), (0, 2.5))
    most = {str(i): 1 for i in range(300)}
    assert len(SamplingParams.parse({"logit_bias": most}).logit_bias) == 300


def test_lists_and_objects_may_come_as_text():
    values = {
        "logit_bias": '{"7": -100, "0": "2.5"}', "stop_token_ids": "[3, 4]",
        "allowed_token_ids": " [5]",
    }  # fmt: skip
    params = SamplingParams.parse(values)
    assert params.logit_bias == ((7, -100.0), (0, 2.5))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((3, 4), (5,))
    for name, wrong in (("logit_bias", "[1]"), ("logit_bias", "{"), ("stop_token_ids", "3")):
        with pytest.raises(RequestError, match=f"sampling_parameters.{name} is "):
            SamplingParams.parse({name: wrong})


def test_n_completions_have_seeds_of_their_own():
    params = SamplingParams.parse({"n": "3", "seed": 5, "top_k": 4})
    assert params.each() == [SamplingParams(seed=seed, top_k=4) for seed in (5, 6, 7)]
    assert SamplingParams(n=2).each() == [SamplingParams(), SamplingParams()]
    assert SamplingParams.parse({"n": None}).n == 1


def test_null_penalties_are_the_defaults():
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias")
    assert SamplingParams.parse(dict.fromkeys(names)) == SamplingParams()


def test_bounds_of_penalties_belong_to_them():
    for values in (
        {"presence_penalty": -2, "frequency_penalty": "2", "repetition_penalty": 2},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 1e-300},
    ):
        params = SamplingParams.parse(values)
        assert params.presence_penalty == float(values["presence_penalty"])
        assert params.frequency_penalty == float(values["frequency_penalty"])
        assert params.repetition_penalty == values["repetition_penalty"]


def test_parameters_not_offered_pass_with_their_neutral_value():
    neutral = {"best_of": 1, "length_penalty": 1.0, "bad_words": None, "skip_special_tokens": True}
    assert SamplingParams.parse(neutral) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "field", "sentence"),
    [
        (
            {"temperature": -1},
            "temperature",
            "sampling_parameters.temperature is -1.0 and must be 0 or more; correct temperature.",
        ),
        (
            {"temperature": float("nan")},
            "temperature",
            "sampling_parameters.temperature is nan and must be a finite number; "
            "correct temperature.",
        ),
        (
            {"temperature": 10**400, "top_p": "half"},
            "temperature",
            f"sampling_parameters.temperature is {10**400} and must be a finite number; "
            "correct temperature.",
        ),
        (
            {"top_p": 0},
            "top_p",
            "sampling_parameters.top_p is 0.0 and must be above 0 and at most 1; correct top_p.",
        ),
        (
            {"top_k": -2},
            "top_k",
            "sampling_parameters.top_k is -2 and must be -1, 0 (all) or more; correct top_k.",
        ),
        (
            {"max_tokens": 0},
            "max_tokens",
            "sampling_parameters.max_tokens is 0 and must be at least 1; correct max_tokens.",
        ),
        (
            {"max_tokens": 2, "min_tokens": 3},
            "min_tokens",
            "sampling_parameters.min_tokens is 3 and must lie between 0 and max_tokens, which "
            "is 2; correct min_tokens.",
        ),
        (
            {"max_tokens": True},
            "max_tokens",
            "sampling_parameters.max_tokens is True and must be a whole number; "
            "correct max_tokens.",
        ),
        (
            {"max_tokens": "many"},
            "max_tokens",
            "sampling_parameters.max_tokens is 'many' and must be a whole number; "
            "correct max_tokens.",
        ),
        (
            {"logprobs": 21},
            "logprobs",
            "sampling_parameters.logprobs is 21 and must lie between 0 and 20; correct logprobs.",
        ),
        (
            {"stop": ["a", ""]},
            "stop",
            "sampling_parameters.stop is ['a', ''] and must not contain an empty string; "
            "correct stop.",
        ),
        (
            {"stop": 3},
            "stop",
            "sampling_parameters.stop is 3 and must be a string or a list of strings; "
            "correct stop.",
        ),
        (
            {"n": 0},
            "n",
            "sampling_parameters.n is 0 and must lie between 1 and 128; correct n.",
        ),
        (
            {"n": 10**30},
            "n",
            f"sampling_parameters.n is {10**30} and must lie between 1 and 128; correct n.",
        ),
        (
            {"n": 2, "temperature": 0},
            "n",
            "sampling_parameters.n is 2 and must be 1 at temperature 0; correct n.",
        ),
        (
            {"best_of": 2},
            "best_of",
            "sampling_parameters.best_of is 2 and this server does not offer best_of; leave it "
            "out or set it to 1.",
        ),
        (
            {"presence_penalty": 2.1},
            "presence_penalty",
            "sampling_parameters.presence_penalty is 2.1 and must lie between -2 and 2; "
            "correct presence_penalty.",
        ),
        (
            {"frequency_penalty": -2.5},
            "frequency_penalty",
            "sampling_parameters.frequency_penalty is -2.5 and must lie between -2 and 2; "
            "correct frequency_penalty.",
        ),
        (
            {"frequency_penalty": "much"},
            "frequency_penalty",
            "sampling_parameters.frequency_penalty is much and must be a finite number; "
            "correct frequency_penalty.",
        ),
        (
            {"repetition_penalty": 0},
            "repetition_penalty",
            "sampling_parameters.repetition_penalty is 0.0 and must be above 0 and at most "
            "2; correct repetition_penalty.",
        ),
        (
            {"repetition_penalty": 2.01},
            "repetition_penalty",
            "sampling_parameters.repetition_penalty is 2.01 and must be above 0 and at most "
            "2; correct repetition_penalty.",
        ),
        (
            {"repetition_penalty": float("nan")},
            "repetition_penalty",
            "sampling_parameters.repetition_penalty is nan and must be a finite number; "
            "correct repetition_penalty.",
        ),
        (
            {"logit_bias": [1, 2]},
            "logit_bias",
            "sampling_parameters.logit_bias is [1, 2] and must be an object of token ids and "
            "biases; correct logit_bias.",
        ),
        (
            {"logit_bias": {"the": 2}},
            "logit_bias",
            "sampling_parameters.logit_bias is 'the' and must be a whole number; correct "
            "logit_bias.",
        ),
        (
            {"logit_bias": {"1": "inf"}},
            "logit_bias",
            "sampling_parameters.logit_bias is inf and must be a finite number; correct "
            "logit_bias.",
        ),
        (
            {"logit_bias": {"1": 100.5}},
            "logit_bias",
            "sampling_parameters.logit_bias is {1: 100.5} and must have biases between -100 "
            "and 100; correct logit_bias.",
        ),
        (
            {"logit_bias": {"-1": 2}},
            "logit_bias",
            "sampling_parameters.logit_bias is {-1: 2.0} and must not contain a negative id; "
            "correct logit_bias.",
        ),
        (
            {"logit_bias": {"1": 2, "01": 3}},
            "logit_bias",
            "sampling_parameters.logit_bias is [(1, 2.0), (1, 3.0)] and must name a token id "
            "once; correct logit_bias.",
        ),
        (
            {"logit_bias": {str(i): 1 for i in range(301)}},
            "logit_bias",
            "sampling_parameters.logit_bias is 301 entries long and must have at most 300; "
            "correct logit_bias.",
        ),
        (
            {"temprature": 1},
            "temprature",
            "sampling_parameters.temprature is not a sampling parameter; did you mean temperature?",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_field(values, field, sentence):
    with pytest.raises(RequestError) as raised:
        SamplingParams.parse(values)
    assert str(raised.value) == sentence
    assert raised.value.field == field


def test_prompt_must_be_neither_empty_nor_too_long():
    check_prompt([1] * 7, max_context=8)
    with pytest.raises(RequestError) as raised:
        check_prompt([], max_context=8)
    assert str(raised.value) == (
        "text_input is empty and the model needs at least one token to continue; send a prompt."
    )
    with pytest.raises(RequestError) as raised:
        check_prompt([1] * 8, max_context=8)
    assert str(raised.value) == (
        "text_input has 8 tokens and must leave room for one more in the context of 8; "
        "shorten the prompt to at most 7 tokens."
    )
    assert raised.value.field == "text_input"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"prompt_logprobs": 21},
            "sampling_parameters.prompt_logprobs is 21 and must lie between 0 and 20; correct "
            "prompt_logprobs.",
        ),
        (
            {"allowed_token_ids": [3, -1]},
            "sampling_parameters.allowed_token_ids is [3, -1] and must not be negative; correct "
            "allowed_token_ids.",
        ),
        (
            {"bad_words": ["a"] * 129},
            "sampling_parameters.bad_words is 129 words long and must be at most 128; correct "
            "bad_words.",
        ),
        (
            {"bad_words": ["a", ""]},
            "sampling_parameters.bad_words is ['a', ''] and must not contain an empty string; "
            "correct bad_words.",
        ),
        (
            {"truncate_prompt_tokens": 0},
            "sampling_parameters.truncate_prompt_tokens is 0 and must be -1 or at least 1; correct "
            "truncate_prompt_tokens.",
        ),
    ],
)
def test_what_came_later_is_checked_too(values, sentence):
    with pytest.raises(RequestError) as raised:
        SamplingParams.parse(values)
    assert str(raised.value) == sentence


def test_allowed_ids_must_be_in_the_vocabulary():
    with pytest.raises(RequestError) as raised:
        check_token_ids(SamplingParams(allowed_token_ids=(9, 10)), vocab_size=10, eos_id=0)
    assert str(raised.value) == (
        "sampling_parameters.allowed_token_ids is [9, 10] and must be below the vocabulary size "
        "10; correct allowed_token_ids."
    )


def test_stop_token_ids_must_be_in_the_vocabulary():
    check_token_ids(SamplingParams(stop_token_ids=(9,)), vocab_size=10, eos_id=0)
    with pytest.raises(RequestError, match="must be below the vocabulary size 10"):
        check_token_ids(SamplingParams(stop_token_ids=(3, 10)), vocab_size=10, eos_id=0)


def test_biased_ids_must_be_in_the_vocabulary():
    check_token_ids(SamplingParams(logit_bias=((9, 1.0),)), vocab_size=10, eos_id=0)
    with pytest.raises(RequestError) as raised:
        check_token_ids(SamplingParams(logit_bias=((3, 1.0), (10, -1.0))), vocab_size=10, eos_id=0)
    assert str(raised.value) == (
        "sampling_parameters.logit_bias is {3: 1.0, 10: -1.0} and must name ids below the "
        "vocabulary size 10; correct logit_bias."
    )
