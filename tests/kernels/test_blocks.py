from __future__ import annotations

import pytest
import torch

from dualray.kernels import blocks as kernel
from dualray.kernels.blocks import blocks


@pytest.mark.parametrize(
    ("rows", "copies", "ends"),
    [(7, 1, [3, 6, 7]), (4, 3, [1, 2, 3, 4]), (2, 99, [1, 2]), (0, 1, [])],
)
def test_blocks_cover_all_rows_once(rows, copies, ends, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK_NUMEL", 15)
    slices = list(blocks(torch.empty(rows, 5), copies))
    assert [part.stop for part in slices] == ends
    assert [part.start for part in slices] == [0, *ends][: len(ends)]


def test_other_devices_take_all_rows_at_once(monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_BLOCK_NUMEL", 15)
    assert list(blocks(torch.empty(7, 5, device="meta"))) == [slice(0, 7)]
    assert list(blocks(torch.empty(0, 5, device="meta"))) == []
