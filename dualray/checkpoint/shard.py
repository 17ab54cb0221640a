"""One safetensors file: written through to the disk with its hash, read back memory-mapped.

The format is a u64 header length, a JSON header (dtype, shape, byte range of each key) and the
tensors' bytes without holes. It is written here by hand, since the library wants all bytes of a
file in memory at once and tells no hash, and its slices know nothing of flat ranges.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from dualray.checkpoint.manifest import DTYPE_NAMES, DamagedError, FileEntry, check_size


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A tensor that is written without ever being whole in memory."""

    key: str
    """Key in the file."""
    shape: tuple[int, ...]
    """Its shape there."""
    dtype: torch.dtype
    """Its dtype there."""
    chunks: Callable[[], Iterable[Tensor]]
    """Its values in row-major order, cut anywhere; called once."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_shard(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], Tensor]]) -> FileEntry:
    """Writes (key, shape, flat tensor) triples into a new file."""

    def stream(key: str, shape: tuple[int, ...], tensor: Tensor) -> Stream:
        return Stream(key=key, shape=shape, dtype=tensor.dtype, chunks=lambda: [tensor])

    return write_streams(path, [stream(*item) for item in tensors])


def batches(streams: Iterable[Stream], limit_bytes: int) -> Iterator[list[Stream]]:
    """Groups streams into files, in order; one that no file could hold has its own."""
    assert limit_bytes > 0, "a file holds a byte at least"
    batch: list[Stream] = []
    room = limit_bytes
    for stream in streams:
        if batch and stream.nbytes > room:
            yield batch
            batch, room = [], limit_bytes
        batch.append(stream)
        room -= stream.nbytes
    if batch:
        yield batch


def write_streams(
    path: Path,
    streams: Sequence[Stream],
    metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> FileEntry:
    """Writes streams into a new file, one after the other.

    `metadata` is the header's own; `progress` is told bytes written.
    """
    # Widest elements first keep every tensor aligned without padding, which the format forbids.
    streams = sorted(streams, key=lambda stream: -stream.dtype.itemsize)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for stream in streams:
        start, end = end, end + stream.nbytes
        header[stream.key] = {
            "dtype": DTYPE_NAMES[stream.dtype],
            "shape": stream.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[Any]:
        yield struct.pack("<Q", len(text)) + text
        for stream in streams:
            written = 0
            for chunk in stream.chunks():
                assert chunk.dtype == stream.dtype, f"{stream.key}: a chunk of {chunk.dtype}"
                written += chunk.nbytes
                yield chunk.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
                progress(chunk.nbytes)
            assert written == stream.nbytes, f"{stream.key}: {written} of {stream.nbytes} bytes"

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

    @cached_property
    def _address(self) -> int:
        return torch.frombuffer(self.data, dtype=torch.uint8).data_ptr()

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

    def forget(self, part: Tensor) -> None:
        """Drop the pages of a `view` from this process; reading them again maps them again.

        Only safe while nobody has written to the view.
        """
        start = part.data_ptr() - self._address
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, first, start + part.nbytes - first)
