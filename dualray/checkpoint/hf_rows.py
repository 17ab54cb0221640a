"""A large tensor's rows, a chunk at a time and in any order: what bounds the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22


def row_ranges(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of the rows that are in memory together: 4 Mi elements, or one row."""
    step = max(_CHUNK_ELEMENTS // max(width, 1), 1)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def in_order(
    rows: Tensor | None, num_rows: int, width: int, read: Callable[[int, int], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor's rows in the order of `rows` (all in their own for None), a chunk at a time.

    Yields the int64 row numbers of a chunk and their values; `read(start, stop)` gives adjacent
    rows of `width` elements.
    """
    for start, stop in row_ranges(num_rows, width):
        if rows is None:
            yield torch.arange(start, stop), read(start, stop)
        else:
            wanted = rows[start:stop]
            first, last = int(wanted.min()), int(wanted.max()) + 1
            yield wanted, read(first, last)[wanted - first]
