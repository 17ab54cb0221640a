"""What a row is while it travels: its code, and what is packed beside it.

gloo and NCCL carry bytes whatever they mean, so rows in FP8 and rows with numbers of other types
beside them travel as uint8. N rows, D width, W width of what travels.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dualray.kernels.blocks import blocks
from dualray.kernels.quantize import (
    E4M3,
    dequantise,
    exponents,
    num_tiles,
    quantise_into,
    scales_of_exponents,
)

Column = tuple[torch.dtype, int]
"""Type and number of the values that a record has side by side."""


class Records:
    """Layout of records: columns of several types, each where its type may lie."""

    def __init__(self, *columns: Column) -> None:
        self._columns: list[tuple[int, torch.dtype, int]] = []
        end = 0
        for dtype, width in columns:
            start = _round_up(end, dtype.itemsize)
            end = start + width * dtype.itemsize
            self._columns.append((start, dtype, end))
        self.record_bytes = _round_up(end, max(dtype.itemsize for dtype, _ in columns))

    def empty(self, num_records: int, device: torch.device) -> Tensor:
        """(num_records, record_bytes) uint8."""
        return torch.empty(num_records, self.record_bytes, dtype=torch.uint8, device=device)

    def columns(self, records_NW: Tensor) -> list[Tensor]:
        """Views (N, width) of the columns, to be read or written."""
        return [records_NW[:, start:end].view(dtype) for start, dtype, end in self._columns]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def choice_dtype(num_slots: int) -> torch.dtype:
    """What the slots of a token's choices travel as; -1 is none."""
    return torch.int16 if num_slots < 2**15 else torch.int32


class RowCode(Protocol):
    """How a row is written while it travels."""

    def column(self, width: int, dtype: torch.dtype) -> Column:
        """Of a row of `width` values of `dtype`."""
        ...

    def encode(self, x_ND: Tensor) -> Tensor: ...

    def decode(self, coded_NW: Tensor, width: int, dtype: torch.dtype) -> Tensor: ...


class PlainRows:
    """Rows travel as they are."""

    def column(self, width: int, dtype: torch.dtype) -> Column:
        return dtype, width

    def encode(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def decode(self, coded_NW: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return coded_NW


class Fp8Rows:
    """E4M3 values, then a byte a tile for its scale, a power of two (arXiv 2412.19437, 3.3.3).

    With such scales a row that is decoded, and coded again under the same tiles, is the same.
    """

    def column(self, width: int, dtype: torch.dtype) -> Column:
        return torch.uint8, width + num_tiles(width)

    def encode(self, x_ND: Tensor) -> Tensor:
        N, D = x_ND.shape
        coded_NW = torch.empty(N, D + num_tiles(D), dtype=torch.uint8, device=x_ND.device)
        scales_NB = torch.empty(N, num_tiles(D), dtype=torch.float32, device=x_ND.device)
        for rows in blocks(x_ND):
            values = coded_NW[rows, :D].view(E4M3)
            quantise_into(x_ND[rows], values, scales_NB[rows], power_of_two=True)
        coded_NW[:, D:] = exponents(scales_NB)
        return coded_NW

    def decode(self, coded_NW: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        scales_NB = scales_of_exponents(coded_NW[:, width:])
        return dequantise(coded_NW[:, :width].view(E4M3), scales_NB, dtype)
