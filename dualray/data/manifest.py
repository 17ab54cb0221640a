"""`manifest.json` of a folder of token shards: what is in it, under which hashes.

`data_sha256` names the *tokens*: it covers the tokenizer and, per split, the token stream, but not
how many shards the stream is cut into nor where the text came from. Runs and checkpoints quote it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dualray.errors import DataError

MANIFEST_FILE = "manifest.json"
SCHEMA_VERSION = 1
SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class Shard:
    file: str
    """Name inside the folder."""
    num_tokens: int
    num_bytes: int
    """Size of the file."""
    xxh3: str
    """XXH3-128 of the file, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Split:
    num_tokens: int
    """Tokens of the stream: one end-of-document at its start and one after each document."""
    num_bytes: int
    """UTF-8 bytes of the text that the stream encodes: the divisor of bits per byte."""
    num_documents: int
    xxh3: str
    """XXH3-128 of the token stream as little-endian integers of `dtype`."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True, kw_only=True)
class DataManifest:
    schema_version: int = SCHEMA_VERSION
    tokenizer: str
    """`bytes`, `bpe` or `file`."""
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: str
    """`uint16` or `uint32`."""
    heldout_fraction: float
    segment_bytes: int
    splits: dict[str, Split]
    heldout_text: Shard
    """The held-out text itself (zstd), for the compressors' yardsticks; num_tokens is 0."""
    sources: tuple[str, ...]
    """As they were given to `build`."""

    @property
    def num_tokens(self) -> int:
        return sum(split.num_tokens for split in self.splits.values())

    @property
    def data_sha256(self) -> str:
        streams = {
            name: [split.num_tokens, split.num_bytes, split.xxh3]
            for name, split in self.splits.items()
        }
        named = [self.schema_version, self.tokenizer_sha256, self.eos_id, self.dtype, streams]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        content = asdict(self) | {"data_sha256": self.data_sha256}
        return json.dumps(content, indent=2, ensure_ascii=True) + "\n"


def read_manifest(folder: Path) -> DataManifest:
    """Raises DataError if `folder` holds no shards, or a manifest that is damaged or too new."""
    path = folder / MANIFEST_FILE
    hint = f"build it with `dualray data build SRC --tokenizer bpe:4096 --out {folder}`"
    if not folder.is_dir():
        raise DataError(f"data folder {folder} does not exist", hint=hint)
    if not path.is_file():
        raise DataError(f"data folder {folder} has no {MANIFEST_FILE}", hint=hint)
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    if version != SCHEMA_VERSION:
        raise DataError(
            f"schema_version of {path} is {version} and this dualray reads {SCHEMA_VERSION}",
            hint="build the shards again with this version",
        )
    try:
        stated = content.pop("data_sha256")
        content["splits"] = {name: _split(content["splits"][name]) for name in SPLITS}
        content["heldout_text"] = Shard(**content["heldout_text"])
        content["sources"] = tuple(content["sources"])
        manifest = DataManifest(**content)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path) from error
    if manifest.data_sha256 != stated:
        raise _damaged(path)
    return manifest


def _split(content: dict) -> Split:
    shards = tuple(Shard(**shard) for shard in content["shards"])
    return Split(**(content | {"shards": shards}))


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged", hint="build the shards again")
