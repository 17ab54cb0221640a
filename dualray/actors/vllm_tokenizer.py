"""The text side of the model as files, for gateways that make ids and text themselves.

They are those of the run's tokenizer folder, byte for byte, and what a loader of Hugging Face's
tokenizers needs besides: a chat template, `config.json` and `generation_config.json`. Raw bytes
have no tokenizer.json of their own, but one that gives the same ids can be made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from dualray.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from dualray.model.config import ModelConfig
from dualray.model.hugging_face import to_hugging_face

CHUNK_BYTES = 64 * 1024
"""Most bytes of one message: what vLLM's own service sends."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Jinja. For models that nobody has taught a format of conversations: a play's, speaker and
colon, which occurs in plain text."""

_TOKENIZER, _TEXT = "tokenizer.json", "tokenizer_config.json"
_MODEL, _GENERATION = "config.json", "generation_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # zip knows no earlier date


def model_files(
    folder: Path, tokenizer: Tokenizer, model: ModelConfig, dtype: str
) -> dict[str, bytes]:
    """Files by name: those of a tokenizer folder, completed. Weights are of `train.dtype`."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
    text = _object(files.get(_TEXT))
    if tokenizer.kind == "bytes":
        files[_TOKENIZER] = byte_level_json()
        text["eos_token"] = END_OF_DOCUMENT
    text.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if not any(name in files for name in _TEMPLATES):
        text.setdefault("chat_template", CHAT_TEMPLATE)
    ids = {"eos_token_id": tokenizer.eos_id}
    files[_TEXT] = _json(text)
    files[_MODEL] = _json(_config(model, dtype) | ids)
    files.setdefault(_GENERATION, _json({"_from_model_config": True, **ids}))
    return files


def byte_level_json() -> bytes:
    """A tokenizer.json whose ids are UTF-8 bytes, and 256 the end of a document."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END_OF_DOCUMENT])
    return inner.to_str(pretty=False).encode()


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of the files, the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            packed.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def chunks(data: bytes) -> Iterator[tuple[bytes, str]]:
    """`data` in pieces of up to `CHUNK_BYTES`, each with "", the last with its sha256 in hex."""
    for start in range(0, len(data), CHUNK_BYTES):
        last = start + CHUNK_BYTES >= len(data)
        piece = data[start : start + CHUNK_BYTES]
        yield piece, hashlib.sha256(data).hexdigest() if last else ""


def _config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Hugging Face's words for the architecture, or ours where it has none."""
    if model.attention == "mla":
        return to_hugging_face(model, getattr(torch, dtype))
    own = dataclasses.asdict(model)
    return {"model_type": "dualray", "architectures": [], **own, "torch_dtype": dtype}


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's).

    A byte that prints stands for itself, the others for what comes from code point 256 on.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in prints)
    code_points = {byte: byte for byte in prints} | {b: 256 + i for i, b in enumerate(others)}
    return [chr(code_points[byte]) for byte in range(256)]


def _object(content: bytes | None) -> dict[str, Any]:
    return {} if content is None else json.loads(content)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
