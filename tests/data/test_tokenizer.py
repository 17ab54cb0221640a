"""Round trips, identity by sha256, and the ends of documents in given tokenizers."""

import hashlib
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from dualray.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    load_tokenizer,
    parse_bpe,
    require_same_tokenizer,
    train_bpe,
)
from dualray.errors import DataError

CORPUS = ["the cat sat on the mat\n" * 20, "and the dog\tate the mat's cat\n\n" * 20]
BPE = train_bpe(CORPUS, 270)


@settings(deadline=None, max_examples=80)
@given(text=st.text())
def test_round_trip_of_any_text(text):
    for tokenizer in (BPE, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids
        assert tokenizer.encode_batch([text, "cat"]) == [ids, tokenizer.encode("cat")]


def test_special_names_in_text_stay_text():
    text = f"a{END_OF_DOCUMENT}b"
    assert BPE.eos_id not in BPE.encode(text)
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.decode([*BPE.encode("cat"), BPE.eos_id, *BPE.encode("dog")]) == "catdog"


def test_bpe_compresses_and_training_is_deterministic():
    assert BPE.vocab_size == 270
    assert BPE.eos_id == 0
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert train_bpe(iter(CORPUS), 270).sha256 == BPE.sha256


def test_saved_tokenizers_come_back_the_same(tmp_path):
    for tokenizer in (BPE, ByteTokenizer()):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        content = (tmp_path / "tokenizer.json").read_bytes()
        assert again.sha256 == tokenizer.sha256 == hashlib.sha256(content).hexdigest()
        assert (again.kind, again.vocab_size, again.eos_id) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eos_id,
        )
        assert again.encode("the cat") == tokenizer.encode("the cat")
    assert load_tokenizer("bytes").vocab_size == 257


def write_words(folder, ends: str) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    inner.add_special_tokens([ends])
    inner.save(str(folder / "tokenizer.json"))


def test_the_end_of_document_of_a_given_tokenizer(tmp_path):
    write_words(tmp_path, "</s>")
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 2
    write_words(tmp_path, "[STOP]")
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(
        f"tokenizer {tmp_path}/tokenizer.json has none of the end-of-document tokens <|endoftext|>"
    )
    config = tmp_path / "tokenizer_config.json"
    for named in ("[STOP]", {"content": "[STOP]", "lstrip": False}):
        config.write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(tmp_path).eos_id == 2


def test_the_chat_template_travels_with_a_tokenizer(tmp_path):
    given, saved = tmp_path / "given", tmp_path / "saved"
    given.mkdir()
    saved.mkdir()
    write_words(given, "</s>")
    config = given / "tokenizer_config.json"
    for template in ("{{ messages }}", [{"name": "default", "template": "{{ messages }}"}]):
        config.write_text(json.dumps({"eos_token": "</s>", "chat_template": template}))
        load_tokenizer(given).save(saved)
        assert load_tokenizer(saved).chat_template == template
    (given / "chat_template.jinja").write_text("a file of its own comes first")
    assert load_tokenizer(given).chat_template == "a file of its own comes first"
    BPE.save(saved)
    assert json.loads((saved / "tokenizer_config.json").read_text()) == {
        "eos_token": END_OF_DOCUMENT
    }


@pytest.mark.parametrize("number", [2, [2, 0]])
def test_the_end_of_document_of_a_generation_config(tmp_path, number):
    write_words(tmp_path, "[STOP]")
    text = json.dumps({"eos_token_id": number})
    (tmp_path / "generation_config.json").write_text(text)
    assert load_tokenizer(tmp_path).eos_id == 2


def test_holes_in_a_vocabulary_count(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<eos>": 9}, unk_token="a"))
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 10


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1]"])
def test_not_a_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"tokenizer {path} is not a tokenizer.json: ")
    assert "\n" not in str(caught.value)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(DataError) as caught:
        load_tokenizer(f"{tmp_path}/t.json")
    assert str(caught.value) == (
        f"tokenizer is {tmp_path}/t.json and must be `bytes`, `bpe:N` or a tokenizer.json that "
        "exists; check the path."
    )


def test_bpe_specs():
    assert parse_bpe("bpe:4096") == 4096
    assert parse_bpe("bytes") is None
    for spec in ("bpe:", "bpe:4k", "bpe:-5", "bpe:\u0663\u0663\u0663"):
        with pytest.raises(DataError, match="and bpe:N needs a whole number; write bpe:4096"):
            parse_bpe(spec)
    for spec in ("bpe:256", "bpe:9999999"):
        with pytest.raises(DataError, match=f"tokenizer is {spec} and N must be from 257 to "):
            parse_bpe(spec)


def test_a_text_too_poor_for_the_vocabulary():
    with pytest.raises(DataError) as caught:
        train_bpe(CORPUS, 300)
    assert str(caught.value) == (
        "tokenizer is bpe:300 and the text has no more than 277 tokens to learn; write bpe:277 or "
        "give more text."
    )


def test_another_tokenizer_is_refused():
    require_same_tokenizer("a" * 64, "a" * 64, who="the checkpoint")
    with pytest.raises(DataError) as caught:
        require_same_tokenizer("a" * 64, "b" * 64, who="the checkpoint")
    assert str(caught.value) == (
        "tokenizer_sha256 of the token shards is aaaaaaaaaaaa and the checkpoint was made with "
        "bbbbbbbbbbbb; build the shards with the tokenizer.json of the checkpoint."
    )
