"""A Hugging Face model folder: config.json and safetensors files, opened with suspicion.

Everything that can be wrong with the files is found when the folder is opened, from their
headers and lengths alone. Tensors are then read row by row with pread, since the pages of a
memory map count as the process's own memory until somebody drops them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dualray.checkpoint.manifest import DTYPES
from dualray.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_TOKENIZER_PATTERNS = (
    "tokenizer*.json",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "tokenization_*.py",
)
"""What belongs to the text side of a model; generation_config.json names its end token."""

_LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones too


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """One tensor in a file of the folder."""

    name: str
    path: Path
    offset: int
    """Of its first byte in the file."""
    dtype: str
    """As safetensors calls it; not every one can be read."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])


class HfFolder:
    """A context manager; the files stay open inside. Raises CheckpointError for bad files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        with _reading(folder):
            if not folder.is_dir():
                raise CheckpointError(
                    f"{folder} is not a folder",
                    hint=f"name a Hugging Face model's folder, which has {CONFIG} in it",
                )
            self.config = _read_json(folder / CONFIG)
            self.tensors = _tensors(folder)
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, (rows, width) or, of a vector, (rows,)."""
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype]
        stop = tensor.num_rows if stop is None else stop
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=dtype)
        buffer: Any = out.view(-1).view(torch.uint8).numpy()
        target = memoryview(buffer)
        offset = tensor.offset + start * tensor.width * dtype.itemsize
        with _reading(tensor.path):
            if tensor.path not in self._descriptors:
                self._descriptors[tensor.path] = os.open(tensor.path, os.O_RDONLY)
            while target:
                count = os.preadv(self._descriptors[tensor.path], [target], offset)
                if count == 0:
                    raise _damaged(tensor.path, "has become shorter while it was read")
                target, offset = target[count:], offset + count
        return out

    def tokenizer_files(self) -> list[Path]:
        """The files that the text side of the model consists of."""
        found = {path for pattern in _TOKENIZER_PATTERNS for path in self.path.glob(pattern)}
        return sorted(path for path in found if path.is_file())


def _tensors(folder: Path) -> dict[str, HfTensor]:
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise CheckpointError(
            f"{folder} has both {SINGLE} and {INDEX}",
            hint="remove what is not of this version of the model",
        )
    if index:
        return _indexed(folder)
    if single:
        return {tensor.name: tensor for tensor in _header(folder / SINGLE)}
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}",
        hint="take the model's safetensors files; other formats are not read",
    )


def _indexed(folder: Path) -> dict[str, HfTensor]:
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or any(Path(str(f)).name != f for f in index.values()):
        raise _damaged(folder / INDEX, "has no weight_map from tensors to files in its folder")
    found: dict[str, HfTensor] = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{INDEX} names {file}, which is not in {folder}", hint="download it too"
            )
        for tensor in _header(folder / file):
            if index.get(tensor.name) != file:
                raise CheckpointError(
                    f"{folder / file} holds tensor {tensor.name}, and {INDEX} "
                    + (f"has it in {index[tensor.name]}" if tensor.name in index else "does not"),
                    hint="take files and index of one version of the model",
                )
            found[tensor.name] = tensor
    for name, file in index.items():
        if name not in found:
            raise CheckpointError(
                f"{INDEX} has tensor {name} in {file}, which does not hold it",
                hint="take files and index of one version of the model",
            )
    return found


def _header(path: Path) -> list[HfTensor]:
    """What lies in one safetensors file, checked against the file's length."""
    size = path.stat().st_size
    try:
        with _reading(path), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("the header does not fit into the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length
        tensors = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            tensor = HfTensor(
                name=name, path=path, offset=end, dtype=entry["dtype"], shape=tuple(entry["shape"])
            )
            known = DTYPES.get(tensor.dtype)
            if start != end - 8 - length or (
                known is not None and stop - start != tensor.numel * known.itemsize
            ):
                raise ValueError(f"the place of {name} is wrong")
            tensors.append(tensor)
            end += stop - start
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(path, "has no readable safetensors header") from error
    if end != size:
        raise _damaged(path, f"has {size} bytes and its header says {end}")
    return tensors


def refuse_existing_out(out: Path) -> None:
    """Raises CheckpointError if the folder that a command shall make is there."""
    if out.exists():
        raise CheckpointError(f"--out is {out}, which exists", hint="name a new folder")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="download it too")
    try:
        with _reading(path):
            text = path.read_text(encoding="utf-8")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise _damaged(path, "is not a JSON object") from error
    return values


@contextmanager
def _reading(path: Path) -> Generator[None, None, None]:
    """Says in one sentence what the operating system refused."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot read {error.filename or path} ({error.strerror})",
            hint="check the path, the disk and the permissions there",
        ) from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} {what}", hint="download it again")
