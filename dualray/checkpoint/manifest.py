"""What a checkpoint folder says about itself: `manifest.json`, and `COMMIT` that vouches for it.

A checkpoint is a folder `step-N` of safetensors files. A logical tensor (a parameter under its
Hugging Face name, or `optimizer.exp_avg/<name>` and so on) is stored once, cut into flat pieces
that lie in whichever files the writing ranks chose, so any layout can write and any can read.
The manifest holds the hash of every file and `COMMIT` holds the hash of the manifest: one
flipped bit anywhere breaks the chain. `COMMIT` is the last file written; without it there is
no checkpoint. Nothing in the folder is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from dualray.errors import CheckpointError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
COMMIT = "COMMIT"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of the dtypes a checkpoint can hold."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def most_common_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """That of most elements, from (dtype, elements) pairs; FP8 counts as the bfloat16 that it is
    scaled to."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, numel in sizes:
        counts[torch.bfloat16 if dtype is torch.float8_e4m3fn else dtype] += numel
    return counts.most_common(1)[0][0]


class DamagedError(CheckpointError):
    """A file of the checkpoint is missing, cut short or altered; another checkpoint may serve."""

    def __init__(
        self, sentence: str, *, hint: str = "restore it from a copy, or use an older checkpoint"
    ) -> None:
        super().__init__(sentence, hint=hint)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One safetensors file as written."""

    size_bytes: int
    """Length of the file."""
    xxh3: str
    """XXH3-128 of the whole file, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class PieceEntry:
    """Where elements [start, start + count) of a flattened logical tensor lie."""

    file: str
    """File name inside the checkpoint folder."""
    key: str
    """Tensor key inside that file."""
    start: int
    """First element."""
    count: int
    """Number of elements."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One logical tensor; its pieces, ascending by start, cover it exactly once."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: str
    """A key of `DTYPES`."""
    pieces: tuple[PieceEntry, ...]
    """Every element is in exactly one of them."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole of `manifest.json`."""

    meta: dict[str, Any]
    """Plain JSON from the writer: step, model, tokenizer_sha256, data_sha256, loader, rng, ..."""
    files: dict[str, FileEntry]
    """Every safetensors file by name."""
    tensors: dict[str, TensorEntry]
    """Every logical tensor by name."""
    schema_version: int = SCHEMA_VERSION
    """Format of this file; a reader refuses newer ones."""

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files.values())

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes, where: Path) -> Manifest:
        """Raises CheckpointError when a newer dualray wrote `text`, DamagedError when it is odd."""
        try:
            raw = json.loads(text)
            version = int(raw["schema_version"])
            if version > SCHEMA_VERSION:
                raise CheckpointError(
                    f"{where / MANIFEST} has schema_version {version} and this dualray reads up "
                    f"to {SCHEMA_VERSION}",
                    hint="upgrade dualray to the version that wrote the checkpoint",
                )
            files = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
            if any(Path(name).name != name for name in files):
                raise ValueError("a file lies outside the folder")
            tensors = {
                name: TensorEntry(
                    shape=tuple(entry["shape"]),
                    dtype=entry["dtype"],
                    pieces=tuple(PieceEntry(**piece) for piece in entry["pieces"]),
                )
                for name, entry in raw["tensors"].items()
            }
            if odd := {entry.dtype for entry in tensors.values()} - DTYPES.keys():
                raise ValueError(f"dtypes {sorted(odd)}")
            return cls(meta=raw["meta"], files=files, tensors=tensors, schema_version=version)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(
                f"{where / MANIFEST} is not a manifest of dualray ({type(error).__name__}: {error})"
            ) from error


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest and checks it against COMMIT; the tensor files stay untouched.

    Raises CheckpointError when `folder` is no checkpoint or a newer one, DamagedError when
    it was never finished or its manifest has changed.
    """
    manifest, commit = folder / MANIFEST, folder / COMMIT
    if not manifest.is_file() and not commit.is_file():
        raise DamagedError(
            f"{folder} is not a checkpoint, since it has no {MANIFEST}",
            hint="name a step-N folder, or a run's folder to use its newest checkpoint",
        )
    if not commit.is_file():
        raise DamagedError(
            f"{folder} has no {COMMIT}, so writing it never finished",
            hint="use an older checkpoint; this one can be deleted",
        )
    if not manifest.is_file():
        raise DamagedError(f"{manifest} is missing")
    text = manifest.read_bytes()
    if commit.read_bytes() != commit_text(text):
        raise DamagedError(
            f"{manifest} does not match the hash in {COMMIT}, so one of the two is damaged"
        )
    return Manifest.from_json(text, folder)


def check_size(path: Path, size_bytes: int) -> None:
    """Raises DamagedError unless the file is there and as long as it was written."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    if path.stat().st_size != size_bytes:
        raise DamagedError(
            f"{path} has {path.stat().st_size} bytes and was written with {size_bytes}"
        )


def commit_text(manifest: bytes) -> bytes:
    """What COMMIT holds for a manifest."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(manifest)}\n".encode()


def hash_file(path: Path) -> str:
    """XXH3-128 of a file, hexadecimal (18 GB/s on one core: the disk is the limit)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
