"""The files that gateways make ids and text with."""

import hashlib
import io
import json
import zipfile

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import tiny_config
from transformers import AutoTokenizer

from dualray.actors.vllm_tokenizer import (
    CHAT_TEMPLATE,
    CHUNK_BYTES,
    archive,
    byte_level_json,
    chunks,
    model_files,
)
from dualray.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, train_bpe
from dualray.model.hugging_face import from_hugging_face

BPE = train_bpe(["the cat sat on the mat, and the dog ate the mat's cat\n" * 20], 270)
BYTES = tokenizers.Tokenizer.from_str(byte_level_json().decode())


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_raw_bytes_have_a_tokenizer_json_of_the_same_ids(text):
    ids = BYTES.encode(text).ids
    assert ids == ByteTokenizer().encode(text)
    assert BYTES.decode(ids) == text


def test_every_id_of_raw_bytes_means_the_same():
    assert BYTES.get_vocab_size() == ByteTokenizer.vocab_size
    assert BYTES.token_to_id(END_OF_DOCUMENT) == ByteTokenizer.eos_id
    broken = [0xE2, 0x82, 0x41, 0xFF]
    assert BYTES.decode(broken) == ByteTokenizer().decode(broken)


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "bytes"])
def test_hugging_face_reads_the_files_and_finds_our_ids(tmp_path, tokenizer):
    source, out = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    tokenizer.save(source)
    model = tiny_config(vocab_size=tokenizer.vocab_size)
    files = model_files(source, tokenizer, model, "bfloat16")
    for name, content in files.items():
        (out / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("the cat's mat").input_ids == tokenizer.encode("the cat's mat")
    assert theirs.eos_token_id == tokenizer.eos_id
    config = json.loads(files["config.json"])
    assert from_hugging_face(config) == model
    assert (config["eos_token_id"], config["torch_dtype"]) == (tokenizer.eos_id, "bfloat16")
    assert json.loads(files["generation_config.json"])["eos_token_id"] == tokenizer.eos_id
    talk = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the mat"}]
    text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == "user: the cat?\nassistant: the mat\nassistant:"


def test_files_of_the_tokenizer_folder_are_kept(tmp_path):
    BPE.save(tmp_path)
    own = {"eos_token": END_OF_DOCUMENT, "chat_template": "{{ own }}", "model_max_length": 7}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    files = model_files(tmp_path, BPE, tiny_config(vocab_size=270), "float32")
    assert files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()
    assert files["generation_config.json"] == b'{"eos_token_id": [0, 3]}'
    assert json.loads(files["tokenizer_config.json"]) == own | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    # A template in a file of its own is not hidden by ours.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END_OF_DOCUMENT}))
    (tmp_path / "chat_template.jinja").write_text("{{ own }}")
    files = model_files(tmp_path, BPE, tiny_config(vocab_size=270), "float32")
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])
    assert files["chat_template.jinja"] == b"{{ own }}"
    (tmp_path / "chat_template.jinja").unlink()
    files = model_files(tmp_path, BPE, tiny_config(vocab_size=270), "float32")
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == CHAT_TEMPLATE


def test_an_attention_that_hugging_face_lacks_keeps_our_names(tmp_path):
    BPE.save(tmp_path)
    model = tiny_config(
        vocab_size=270, attention="mha", q_lora_rank=None, kv_lora_rank=None, qk_nope_head_dim=6
    )
    config = json.loads(model_files(tmp_path, BPE, model, "float32")["config.json"])
    assert config["model_type"] == "dualray"
    assert config["attention"] == "mha"
    assert config["vocab_size"] == 270


def test_the_archive_is_the_same_for_the_same_files():
    files = {"b.json": b"{}", "a.json": b"x" * 1000}
    packed = archive(files)
    assert archive(dict(reversed(files.items()))) == packed
    with zipfile.ZipFile(io.BytesIO(packed)) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == files


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_chunks_are_full_and_the_last_has_the_digest(size):
    data = bytes(i % 251 for i in range(size))
    pieces = list(chunks(data))
    assert b"".join(piece for piece, _ in pieces) == data
    assert all(len(piece) == CHUNK_BYTES for piece, _ in pieces[:-1])
    assert [digest for _, digest in pieces[:-1]] == [""] * (len(pieces) - 1)
    assert pieces[-1][1] == hashlib.sha256(data).hexdigest()
