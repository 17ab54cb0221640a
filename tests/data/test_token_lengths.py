import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe

TRAINED = train_bpe(["the cat \u20ac\u20ac sat    on the mat"] * 4, 275)
BYTE_LEVEL = json.loads(TRAINED.content)["pre_tokenizer"]
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": TRAINED}


def changed(**changes) -> JsonTokenizer:
    content = json.dumps(json.loads(TRAINED.content) | changes).encode()
    return JsonTokenizer(content, TRAINED.eos_token)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8")) | st.from_regex(r"(the |cat|\u20ac| ){,9}"))
def test_no_text_has_fewer_tokens_than_its_bytes_say(name, text):
    tokenizer = TOKENIZERS[name]
    assert len(tokenizer.encode(text)) * tokenizer.max_token_bytes >= len(text.encode())


def test_a_split_that_keeps_all_is_byte_level_too():
    """DeepSeek-V3's pre-tokenizer is of this form, its normaliser an empty sequence."""
    split = {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False}
    before = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    empty = {"type": "Sequence", "normalizers": []}
    same = changed(pre_tokenizer=before, normalizer=empty)
    assert same.max_token_bytes == TRAINED.max_token_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"String": " "},
                        "behavior": "Removed",
                        "invert": False,
                    },
                    BYTE_LEVEL,
                ],
            }
        },
    ],
)
def test_where_text_may_be_lost_nothing_is_known(changes):
    assert changed(**changes).max_token_bytes is None
