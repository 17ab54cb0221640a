"""The fast grouped GEMM against its looped twin, over empty, odd and ragged groups."""

from __future__ import annotations

import pytest
import torch

from dualray.kernels import grouped_gemm, reference
from dualray.kernels.permute import permute, replicate, sort_by_key

SIZES = {
    "ragged": [3, 0, 17, 1],
    "empty": [0, 0, 0, 0],
    "one-full": [0, 0, 9, 0],
    "even": [8, 8, 8, 8],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 24), (10, 7)], ids=["aligned", "odd"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_all_three_products_equal_the_loop(sizes, widths, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inner, outer = widths
    rows = sum(sizes)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    dy = torch.randn(rows, outer, generator=generator).to(dtype)
    weight = torch.randn(len(sizes), outer, inner, generator=generator).to(dtype)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    # Both sides round each product once; their sums differ in order only.
    bounds = {"atol": TOLERANCE[dtype] * inner, "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(
        grouped_gemm.grouped_mm(x, weight, offsets),
        reference.grouped_mm(x, weight.transpose(1, 2), offsets),
        **bounds,
    )
    torch.testing.assert_close(
        grouped_gemm.grouped_mm_input_grad(dy, weight, offsets),
        reference.grouped_mm(dy, weight, offsets),
        **bounds,
    )
    torch.testing.assert_close(
        grouped_gemm.grouped_mm_weight_grad(dy, x, offsets),
        reference.grouped_mm_weight_grad(dy, x, offsets),
        **bounds,
    )


def test_replicate_and_permute_are_gathers_with_exact_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    experts_TK = torch.randint(0, 5, (6, 3), generator=generator)
    order, inverse, counts = sort_by_key(experts_TK.flatten(), 5)
    assert counts.sum() == 18
    assert torch.equal(experts_TK.flatten()[order], experts_TK.flatten().sort().values)
    x = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = replicate(x, order, inverse)
    assert torch.equal(rows, x.repeat_interleave(3, dim=0)[order])
    assert torch.equal(permute(rows, inverse, order), x.repeat_interleave(3, dim=0))
    assert torch.autograd.gradcheck(lambda t: replicate(t, order, inverse), x)
    assert torch.autograd.gradcheck(
        lambda t: permute(t.repeat_interleave(3, dim=0), order, inverse), x
    )


def test_no_tokens_at_all() -> None:
    order, inverse, counts = sort_by_key(torch.empty(0, dtype=torch.int64), 4)
    assert counts.tolist() == [0, 0, 0, 0]
    x = torch.empty(0, 8, requires_grad=True)
    rows = replicate(x, order, inverse)
    rows.sum().backward()
    assert rows.shape == (0, 8)
    assert x.grad is not None
    assert x.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_weight_gradients_are_added_to_a_sum(sizes, dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(sizes), 16, generator=generator).to(dtype)
    dy = torch.randn(sum(sizes), 24, generator=generator).to(dtype)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    total = torch.ones(len(sizes), 24, 16, dtype=torch.promote_types(dtype, torch.float32))
    grouped_gemm.accumulate_weight_grad(total, dy, x, offsets)
    expected = reference.grouped_mm_weight_grad(dy.double(), x.double(), offsets) + 1
    # A product is rounded to its dtype before it is added to a wider sum.
    bounds = {"atol": TOLERANCE[dtype] * 16, "rtol": TOLERANCE[dtype]}
    torch.testing.assert_close(total.double(), expected, **bounds)
