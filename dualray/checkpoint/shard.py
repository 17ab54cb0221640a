"""One safetensors file: written through to the disk with its hash, read back memory-mapped.

The format is a u64 header length, a JSON header (dtype, shape, byte range of each key) and the
tensors' bytes without holes. It is written here by hand, since the library wants all bytes of a
file in memory at once and tells no hash, and its slices know nothing of flat ranges.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dualray.checkpoint.manifest import DTYPE_NAMES, DamagedError, FileEntry, check_size


def write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], Tensor]]) -> FileEntry:
    """Writes (key, shape, flat tensor) triples into a new file."""
    # Widest elements first keep every tensor aligned without padding, which the format forbids.
    tensors = sorted(tensors, key=lambda item: -item[2].element_size())
    header: dict[str, Any] = {}
    end = 0
    for key, shape, tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Any]:
        yield struct.pack("<Q", len(text)) + text
        for _, _, tensor in tensors:
            yield tensor.detach().contiguous().cpu().view(torch.uint8).numpy()

    return write_file(path, chunks())


def write_file(path: Path, chunks: Iterable[Any]) -> FileEntry:
    """Writes a new file through to the disk, hashing on the way."""
    digest = xxhash.xxh3_128()
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
        return FileEntry(size_bytes=file.tell(), xxh3=digest.hexdigest())


@dataclass(frozen=True, kw_only=True)
class MappedShard:
    """A safetensors file in memory, and where its tensors begin and end (bytes)."""

    path: Path
    data: mmap.mmap
    offsets: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path, size_bytes: int) -> MappedShard:
        check_size(path, size_bytes)
        with open(path, "rb") as file:
            # A private map is writable, as torch.frombuffer wants, and never reaches the file.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        try:
            (length,) = struct.unpack_from("<Q", data)
            header = json.loads(data[8 : 8 + length])
            offsets = {
                key: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
                for key, entry in header.items()
                if key != "__metadata__"
            }
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} has no readable safetensors header") from error
        return cls(path=path, data=data, offsets=offsets)

    def view(self, key: str, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        begin, end = self.offsets.get(key, (0, 0))
        if not 0 < begin <= begin + stop * dtype.itemsize <= end <= len(self.data):
            raise DamagedError(f"{self.path} does not hold what its manifest says of {key}")
        offset = begin + start * dtype.itemsize
        return torch.frombuffer(self.data, dtype=dtype, count=stop - start, offset=offset)
