"""Experts walked one by one against grouped products with SwiGLU between them."""

from __future__ import annotations

import pytest
import torch

from dualray.kernels import blocks, reference
from dualray.kernels.expert_walk import (
    add_experts_weight_grad,
    experts,
    experts_grad,
    groups,
    walk_pays,
)
from dualray.kernels.swiglu import swiglu_reference

SIZES = {"ragged": [3, 0, 17, 1], "empty": [0, 0, 0, 0], "last-empty": [5, 9, 0, 0]}


def test_it_pays_on_a_cpu_with_many_rows() -> None:
    rows = torch.empty(256, 4)
    assert walk_pays(rows, 4)
    assert not walk_pays(rows[:255], 4)
    assert not walk_pays(rows.to("meta"), 4)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_and_gradients_equal_the_loop_of_the_twin(sizes, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_NUMEL", 4 * 14)  # four rows at a time
    generator = torch.Generator().manual_seed(0)
    rows, gate_up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((sum(sizes), 10), (4, 14, 10), (4, 10, 7))
    )
    dy = torch.randn(sum(sizes), 10, generator=generator, dtype=torch.float64)
    ends = torch.tensor(sizes).cumsum(0)
    wide = reference.grouped_mm(rows, gate_up.transpose(1, 2), ends)
    hidden = swiglu_reference(wide)
    twin = reference.grouped_mm(hidden, down.transpose(1, 2), ends)
    expected = torch.autograd.grad(twin, (rows, gate_up, down), dy)
    with torch.no_grad():
        out, kept, own_hidden = experts(rows, gate_up, down, ends.tolist(), keep=True)
        again, *nothing = experts(rows, gate_up, down, ends.tolist(), keep=False)
        assert torch.equal(out, again)
        assert nothing == [[], []]
        own_rows = experts_grad(dy, kept, own_hidden, gate_up, down, ends.tolist())
        parts = [part for _, part in groups(ends.tolist())]
        sums = [torch.ones_like(gate_up), torch.ones_like(down)]
        rows_e, dy_e = ([side[part] for part in parts] for side in (rows, dy))
        add_experts_weight_grad(sums[0], kept, rows_e, ends.tolist())
        add_experts_weight_grad(sums[1], dy_e, own_hidden, ends.tolist())
    # The derivative of silu is written differently inside torch.
    bounds = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(out, twin, **bounds)
    torch.testing.assert_close(torch.cat([hidden[:0], *own_hidden]), hidden, **bounds)
    own = (own_rows, sums[0] - 1, sums[1] - 1)
    for ours, theirs in zip(own, expected):
        torch.testing.assert_close(ours, theirs, **bounds)
