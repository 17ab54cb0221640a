"""How much a request may ask for, and which of it makes no sense together."""

import pytest

from dualray.errors import RequestError
from dualray.inference.request import SamplingParams, check_token_ids
from dualray.inference.sampling_parsers import PARSERS


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"stop": ["a"] * 65},
            "sampling_parameters.stop is 65 strings long and must be at most 64; correct stop.",
        ),
        (
            {"stop": ["a", "b" * 1025]},
            "sampling_parameters.stop is of up to 1025 characters and must not contain one of more "
            "than 1024 characters; correct stop.",
        ),
        (
            {"bad_words": ["a", "b" * 257]},
            "sampling_parameters.bad_words is of up to 257 characters and must not contain one of "
            "more than 256 characters; correct bad_words.",
        ),
        (
            {"stop_token_ids": list(range(4097))},
            "sampling_parameters.stop_token_ids is 4097 ids long and must be at most 4096; correct "
            "stop_token_ids.",
        ),
        (
            {"allowed_token_ids": list(range(2**18 + 1))},
            "sampling_parameters.allowed_token_ids is 262145 ids long and must be at most 262144; "
            "correct allowed_token_ids.",
        ),
        (
            {"max_tokens": 2**63},
            "sampling_parameters.max_tokens is 9223372036854775808 and must be at most "
            "9223372036854775807; correct max_tokens.",
        ),
        (
            {"top_k": 2**63},
            "sampling_parameters.top_k is 9223372036854775808 and must be at most "
            "9223372036854775807; correct top_k.",
        ),
        (
            {"seed": 2**64},
            "sampling_parameters.seed is 18446744073709551616 and must have at most 64 bits; "
            "correct seed.",
        ),
        (
            {"temp" * 16 + "t": 1},
            f"sampling_parameters.{'temp' * 16}t is not a sampling parameter; known are "
            f"{', '.join(PARSERS)}.",
        ),
        (
            {"x" * 300: 1},
            f"sampling_parameters.{'x' * 256}... is not a sampling parameter; known are "
            f"{', '.join(PARSERS)}.",
        ),
    ],
)
def test_sizes_are_limited(values, sentence):
    with pytest.raises(RequestError) as raised:
        SamplingParams.parse(values)
    assert str(raised.value) == sentence
    assert len(raised.value.field) < 300


def test_what_is_just_within_the_limits_is_taken():
    values = {
        "stop": ["s" * 1024] * 64, "bad_words": ["w" * 256] * 128, "max_tokens": 2**63 - 1,
        "stop_token_ids": [*range(4096)] * 2, "allowed_token_ids": [*range(2**18)],
        "top_k": 2**63 - 1,
    }  # fmt: skip
    params = SamplingParams.parse(values)
    assert (len(params.stop), len(params.bad_words)) == (64, 128)
    assert params.stop_token_ids == tuple(range(4096))


def test_ids_count_once():
    params = SamplingParams(stop_token_ids=(5, 3, 5), allowed_token_ids=(7, 7, 2))
    assert (params.stop_token_ids, params.allowed_token_ids) == ((5, 3), (7, 2))


def test_seeds_have_64_bits_with_a_sign_or_without():
    last = 2**64 - 1
    assert [p.seed for p in SamplingParams(seed=last, n=2).each()] == [last, 0]
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)
    with pytest.raises(RequestError, match="must have at most 64 bits"):
        SamplingParams(seed=-(2**63) - 1)


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_token_ids": (5,), "stop_token_ids": (5,)},
        {"allowed_token_ids": (5, 9), "stop_token_ids": (5,)},
        {"stop_token_ids": tuple(range(9))},
        {"stop_token_ids": tuple(range(10)), "ignore_eos": True},
    ],
)
def test_min_tokens_need_tokens_that_do_not_end_the_completion(values):
    check_token_ids(SamplingParams(**values), vocab_size=10, eos_id=9)
    with pytest.raises(RequestError) as raised:
        check_token_ids(SamplingParams(min_tokens=8, **values), vocab_size=10, eos_id=9)
    assert str(raised.value) == (
        "sampling_parameters.min_tokens is 8 and must be 0 where every token that may be chosen "
        "ends the completion; correct min_tokens."
    )
    if values.get("ignore_eos") is None and "allowed_token_ids" not in values:
        free = SamplingParams(min_tokens=8, ignore_eos=True, **values)
        check_token_ids(free, vocab_size=10, eos_id=9)
