"""Reading ranges of logical tensors, whatever layout wrote them."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualray.checkpoint.fp8_blocks import block_of, dequantised, scale_name, scale_shape
from dualray.checkpoint.manifest import DTYPES, TensorEntry, load_manifest
from dualray.checkpoint.shard import MappedShard
from dualray.errors import CheckpointError

_PART_BYTES = 1 << 24


class Reader:
    """A committed checkpoint, memory-mapped: only the ranges that are asked for are read.

    What has been copied out is dropped from memory again, part by part, so that reading takes
    no more room than what is read into. Opening checks the manifest against COMMIT, and the
    size of each file when it is first used; hashes of tensor files are checked by
    `store.verify`, once, by whoever picks the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._manifest = load_manifest(self.folder)
        self._files: dict[str, MappedShard] = {}

    @property
    def meta(self) -> dict[str, Any]:
        """What the writer said: step, model, tokenizer_sha256, data_sha256, loader, rng, ..."""
        return self._manifest.meta

    @property
    def size_bytes(self) -> int:
        """Length of all files with tensors."""
        return self._manifest.size_bytes

    def names(self) -> list[str]:
        """Logical names, in the order they were written."""
        return list(self._manifest.tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._manifest.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def expect_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raises CheckpointError unless the logical tensor is here with that global shape."""
        if self.shape(name) != tuple(shape):
            raise CheckpointError(
                f"tensor {name} has shape {list(shape)} here but {list(self.shape(name))} in "
                f"checkpoint {self.folder}",
                hint="use the model that the checkpoint was written with",
            )

    def read(self, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Elements [start, start + count) of the flattened tensor as they are stored, a 1-D copy
        on the CPU. (`read_into` scales FP8 blocks, this does not.)"""
        if count is None:
            count = self._entry(name).numel - start
        out = torch.empty(max(count, 0), dtype=self.dtype(name))
        self._copy(name, out, start)
        return out

    def read_into(self, name: str, view: Tensor, start: int = 0) -> None:
        """Fills `view` (any shape, device and dtype; converted by `copy_`) in row-major order
        with the elements from `start` on, without a copy in between where `view` is contiguous.
        A weight of FP8 blocks is multiplied by its scales.

        Raises CheckpointError when the tensor is missing or has too few elements.
        """
        self._expect_range(name, start, view.numel())
        if not view.is_contiguous():
            dense = torch.empty(view.shape, dtype=view.dtype, device=view.device)
            self.read_into(name, dense, start)
            view.detach().copy_(dense)
            return
        target = view.detach().view(-1)
        if scale_name(name) in self:
            self._dequantise(name, target, start)
        else:
            self._copy(name, target, start)

    def _expect_range(self, name: str, start: int, count: int) -> None:
        entry = self._entry(name)
        if not 0 <= start <= start + count <= entry.numel:
            raise CheckpointError(
                f"tensor {name} has {entry.numel} elements in checkpoint {self.folder} and "
                f"[{start}:{start + count}] was asked for",
                hint="use the model that the checkpoint was written with",
            )

    def _copy(self, name: str, flat: Tensor, start: int) -> None:
        """Stored elements from `start` on into a 1-D tensor."""
        self._expect_range(name, start, flat.numel())
        filled = 0
        for part in self._parts(self._entry(name), start, start + flat.numel()):
            flat[filled : filled + part.numel()].copy_(part)
            filled += part.numel()
        assert filled == flat.numel(), f"the pieces of {name} leave a gap"

    def _dequantise(self, name: str, flat: Tensor, start: int) -> None:
        """FP8 elements from `start` on times their blocks' scales, some rows at a time."""
        block = block_of(self.meta.get("quantization_config"))
        shape = self.shape(name)
        self.expect_shape(scale_name(name), scale_shape(shape, block))
        scales = self.read(scale_name(name)).view(scale_shape(shape, block))
        width, stop = shape[1], start + flat.numel()
        num_rows = max(_PART_BYTES // 4 // width, 1)
        for low in range(start // width, -(-stop // width), num_rows):
            rows = torch.arange(low, min(low + num_rows, -(-stop // width)))
            values = self.read(name, low * width, len(rows) * width).view(-1, width)
            part = dequantised(values, rows, scales, block).view(-1)
            first, last = max(start, low * width), min(stop, (low + len(rows)) * width)
            flat[first - start : last - start].copy_(part[first - low * width : last - low * width])

    def _parts(self, entry: TensorEntry, start: int, stop: int) -> Iterator[Tensor]:
        """Views of the mapped files that together are elements [start, stop), each good until
        the next."""
        if start == stop:
            return
        first = bisect.bisect_right(entry.pieces, start, key=lambda piece: piece.start) - 1
        for piece in entry.pieces[first:]:
            if piece.start >= stop:
                return
            if piece.file not in self._files:
                size_bytes = self._manifest.files[piece.file].size_bytes
                self._files[piece.file] = MappedShard.open(self.folder / piece.file, size_bytes)
            file, dtype = self._files[piece.file], DTYPES[entry.dtype]
            low = max(start, piece.start) - piece.start
            high = min(stop, piece.start + piece.count) - piece.start
            step = _PART_BYTES // dtype.itemsize
            for begin in range(low, high, step):
                part = file.view(piece.key, dtype, begin, min(begin + step, high))
                yield part
                file.forget(part)

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._manifest.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"checkpoint {self.folder} has no tensor {name}",
                hint="use the model that the checkpoint was written with",
            ) from None


def expect(
    reader: Reader,
    model: dict[str, Any],
    tokenizer_sha256: str | None = None,
    data_sha256: str | None = None,
) -> None:
    """Raises CheckpointError naming the first field in which this run differs from the checkpoint.

    `model` is the model configuration as a dict; None for a hash, on either side, leaves it
    unchecked.
    """
    # Through JSON, since that is what the checkpoint's side has been through.
    here: dict[str, Any] = {"model": json.loads(json.dumps(model))}
    if tokenizer_sha256 is not None:
        here["tokenizer_sha256"] = tokenizer_sha256
    if data_sha256 is not None:
        here["data_sha256"] = data_sha256
    here = {field: value for field, value in here.items() if reader.meta.get(field, "") is not None}
    there = {field: reader.meta.get(field) for field in here}
    for field, ours, theirs in _differences("", here, there):
        raise CheckpointError(
            f"{field} is {ours} here but {theirs} in checkpoint {reader.folder}",
            hint="use what the checkpoint was written with, or start a run of another name",
        )


def _differences(prefix: str, here: dict, there: dict) -> Iterator[tuple[str, object, object]]:
    for key in [*here, *(key for key in there if key not in here)]:
        ours, theirs = here.get(key, "absent"), there.get(key, "absent")
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(f"{prefix}{key}.", ours, theirs)
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs
