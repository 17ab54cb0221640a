"""Text to token ids and back: bytes, a byte-level BPE trained here, or a given tokenizer.json.

A tokenizer is identified by the sha256 of its `tokenizer.json`, which travels with shards and
checkpoints. Text never turns into special tokens: the characters `<|endoftext|>` in a document or
a prompt are encoded as ordinary text, only the data layer itself writes `eos_id`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dualray.data.token_lengths import most_bytes
from dualray.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
# What the usual tokenizer.json files call their end of a document, most specific first.
_KNOWN_ENDS = (
    END_OF_DOCUMENT,
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, written with fullwidth bars
    "<|end_of_text|>",
    "</s>",
    "<eos>",
)
_BYTES_JSON = b'{"model": {"type": "dualray-bytes"}}\n'
MIN_BPE_VOCAB = 257
MAX_BPE_VOCAB = 1 << 20


class Tokenizer(Protocol):
    """`decode(encode(text)) == text` for byte-level tokenizers; ids are below `vocab_size`."""

    @property
    def kind(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def content(self) -> bytes:
        """tokenizer.json, byte for byte."""
        ...

    @property
    def max_token_bytes(self) -> int | None:
        """Most bytes of text that a token stands for; None if there is no such number."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...
    def save(self, folder: Path | str) -> None: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 as end of document."""

    kind = "bytes"
    vocab_size = 257
    eos_id = 256
    content = _BYTES_JSON
    sha256 = hashlib.sha256(_BYTES_JSON).hexdigest()
    max_token_bytes = 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        end = b"" if skip_special_tokens else END_OF_DOCUMENT.encode()
        return b"".join(bytes((i,)) if i < 256 else end for i in ids).decode(errors="replace")

    def save(self, folder: Path | str) -> None:
        (Path(folder) / "tokenizer.json").write_bytes(_BYTES_JSON)


class JsonTokenizer:
    """A `tokenizers` tokenizer kept together with the exact bytes of its tokenizer.json."""

    def __init__(
        self,
        content: bytes,
        eos_token: str,
        *,
        kind: str = "file",
        chat_template: str | list[dict[str, str]] | None = None,
    ) -> None:
        """`chat_template` makes a prompt of a conversation: Jinja, or several by name."""
        self.kind = kind
        self.eos_token = eos_token
        self.chat_template = chat_template
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.content = content
        self._inner = tokenizers.Tokenizer.from_str(content.decode())
        # Without this, the text "<|endoftext|>" in a document would end it.
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        ids = self._inner.get_vocab(with_added_tokens=True)
        # Not len(ids): published vocabularies have holes.
        self.vocab_size = max(ids.values()) + 1
        self.eos_id = ids[eos_token]
        self.max_token_bytes = most_bytes(json.loads(content), ids)

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def save(self, folder: Path | str) -> None:
        """Writes tokenizer.json byte for byte, end token and chat template beside it."""
        (Path(folder) / "tokenizer.json").write_bytes(self.content)
        config: dict[str, Any] = {"eos_token": self.eos_token}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(spec: Path | str) -> Tokenizer:
    """`bytes`, a tokenizer.json, or a folder that holds one (token shards, a checkpoint)."""
    if str(spec) == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"tokenizer is {spec} and must be `bytes`, `bpe:N` or a tokenizer.json that exists",
            hint="check the path",
        )
    content = path.read_bytes()
    if content == _BYTES_JSON:
        return ByteTokenizer()
    try:
        parsed = json.loads(content)
        names = tokenizers.Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust library raises plain Exception
        raise DataError(
            f"tokenizer {path} is not a tokenizer.json: {str(error).splitlines()[0]}",
            hint="give the tokenizer.json of the Hugging Face `tokenizers` format",
        ) from error
    kind = "bpe" if parsed.get("model", {}).get("type") == "BPE" else "file"
    template = _chat_template(path)
    return JsonTokenizer(content, _end_token(path, names), kind=kind, chat_template=template)


def _end_token(path: Path, names: dict[str, int]) -> str:
    """As the files beside it say; `eos_token_id` may be a list, whose first comes first."""
    named = _json_beside(path, "tokenizer_config.json").get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    if isinstance(named, str) and named in names:
        return named
    number = _json_beside(path, "generation_config.json").get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    for name, token in names.items():
        if token == number and number is not None:
            return name
    for name in _KNOWN_ENDS:
        if name in names:
            return name
    raise DataError(
        f"tokenizer {path} has none of the end-of-document tokens {', '.join(_KNOWN_ENDS)}",
        hint='put a tokenizer_config.json with "eos_token" beside it',
    )


def _chat_template(path: Path) -> str | list[dict[str, str]] | None:
    """As transformers finds it: a file of its own comes before tokenizer_config.json."""
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return _json_beside(path, "tokenizer_config.json").get("chat_template")


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    file = path.with_name(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def parse_bpe(spec: str) -> int | None:
    """N of `bpe:N`, None for any other spec. Raises DataError for an N that cannot be."""
    if not spec.startswith("bpe:"):
        return None
    number = spec.removeprefix("bpe:")
    if not number.isascii() or not number.isdigit():
        raise DataError(
            f"tokenizer is {spec} and bpe:N needs a whole number", hint="write bpe:4096"
        )
    vocab_size = int(number)
    if not MIN_BPE_VOCAB <= vocab_size <= MAX_BPE_VOCAB:
        raise DataError(
            f"tokenizer is {spec} and N must be from {MIN_BPE_VOCAB} to {MAX_BPE_VOCAB} "
            "(256 bytes and one end of document come first)",
            hint="write bpe:4096",
        )
    return vocab_size


def train_bpe(texts: Iterable[str] | Iterator[str], vocab_size: int) -> JsonTokenizer:
    """Byte-level BPE with end of document as id 0.

    Raises DataError if the text runs out of pairs to merge before `vocab_size` is reached.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if (found := inner.get_vocab_size()) < vocab_size:
        raise DataError(
            f"tokenizer is bpe:{vocab_size} and the text has no more than {found} tokens to learn",
            hint=f"write bpe:{found} or give more text",
        )
    content = (inner.to_str(pretty=False) + "\n").encode()
    return JsonTokenizer(content, END_OF_DOCUMENT, kind="bpe")


def require_same_tokenizer(found: str, wanted: str, *, who: str) -> None:
    """Refuses token shards whose tokenizer is not the one that `who` (a checkpoint) goes with."""
    if found != wanted:
        raise DataError(
            f"tokenizer_sha256 of the token shards is {found[:12]} and {who} was made with "
            f"{wanted[:12]}",
            hint=f"build the shards with the tokenizer.json of {who}",
        )
