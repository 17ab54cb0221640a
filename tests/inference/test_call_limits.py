import pytest

from dualray.errors import RequestError
from dualray.inference.call_limits import check_call
from dualray.inference.request import SamplingParams

CONTEXT = 4096


def check(max_context=CONTEXT, max_waiting=1024, **values):
    check_call(SamplingParams(**values), max_context, max_waiting)


def test_clients_get_what_openai_and_vllm_give():
    check()
    check(n=128, max_tokens=CONTEXT)
    check(n=9, max_tokens=CONTEXT, logprobs=20)
    check(max_context=163840, max_tokens=10**9, logprobs=20)
    check(n=8, allowed_token_ids=tuple(range(129280)))
    check(n=128, bad_words=("a bad word",) * 100)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"n": 9, "max_waiting": 8},
            "sampling_parameters.n is 9 and must be at most serve.max_waiting, which is 8; "
            "correct n.",
        ),
        (
            {"n": 128, "max_tokens": 10**9, "logprobs": 20},
            "sampling_parameters.n x max_tokens x (logprobs + 1) is 128 x 4096 x 21 and must be at "
            "most 4194304; lower n, max_tokens or logprobs.",
        ),
        (
            {"n": 9, "allowed_token_ids": tuple(range(120_000)), "stop_token_ids": (1,)},
            "sampling_parameters.n x (stop_token_ids + allowed_token_ids) is 9 x 120001 and must "
            "be at most 1048576; lower n or send fewer ids.",
        ),
        (
            {"n": 5, "bad_words": ("w" * 256,) * 128},
            "sampling_parameters.n x characters of bad_words is 5 x 32768 and must be at most "
            "131072; lower n or send fewer words.",
        ),
    ],
)
def test_many_completions_together_have_limits(values, sentence):
    with pytest.raises(RequestError) as raised:
        check(**values)
    assert str(raised.value) == sentence
    assert raised.value.field == "n"
