import pytest

from dualray.actors.prompt_ids import prompt_ids_of
from dualray.data.tokenizer import ByteTokenizer, train_bpe
from dualray.errors import RequestError
from dualray.inference.request import SamplingParams

CONTEXT = 8


class Unread(ByteTokenizer):
    """Must not be asked for ids."""

    max_token_bytes = 3

    def encode(self, text):
        raise AssertionError("this takes long")


def test_a_text_that_no_tokens_make_short_enough_is_not_encoded():
    with pytest.raises(RequestError) as raised:
        prompt_ids_of("\u20ac" * 8 + "a", Unread(), CONTEXT, SamplingParams())
    assert str(raised.value) == (
        "text_input has 25 bytes, which are 9 tokens or more, and must leave room for one more in "
        "the context of 8; shorten the prompt to at most 7 tokens."
    )
    assert raised.value.field == "text_input"


@pytest.mark.parametrize("text", ["a" * 24, "\u20ac" * 8])
def test_whatever_may_be_short_enough_is_encoded(text):
    with pytest.raises(AssertionError, match="takes long"):
        prompt_ids_of(text, Unread(), CONTEXT, SamplingParams())


def test_a_text_that_is_to_be_cut_is_encoded_whole():
    tokenizer = train_bpe(["the cat sat on the mat"] * 4, 269)
    text = "the cat " * 99
    assert tokenizer.max_token_bytes is not None
    assert len(text) > tokenizer.max_token_bytes * CONTEXT
    params = SamplingParams(truncate_prompt_tokens=5)
    assert prompt_ids_of(text, tokenizer, CONTEXT, params) == tuple(tokenizer.encode(text)[-5:])
