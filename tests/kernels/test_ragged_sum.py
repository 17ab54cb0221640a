"""Bags of any size against a loop over them."""

from __future__ import annotations

import pytest
import torch

from dualray.kernels.ragged_sum import ragged_sum, ragged_sum_reference, weighted_rows

# Sums of up to 5 products are off by some units of fp32. Both round to bf16 once, at the end, and
# what is in the middle between two numbers the kernel does not round to even: one unit, 2^-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [[2, 0, 5, 1], [0, 0], [], [3]], ids=str)
def test_bags_equal_the_twin(dtype, weighted, sizes) -> None:
    generator = torch.Generator().manual_seed(len(sizes))
    for width in (1, 24, 130):
        rows = torch.randn(7, width, generator=generator).to(dtype)
        member = torch.randint(0, 7, (sum(sizes),), generator=generator)
        # Gates are fp32 beside bf16 rows.
        gate_dtype = torch.promote_types(dtype, torch.float32)
        weight = torch.rand(sum(sizes), generator=generator).to(gate_dtype) if weighted else None
        bags = torch.tensor(sizes, dtype=torch.int64)
        own = ragged_sum(rows, member, bags, weight)
        twin = ragged_sum_reference(rows, member, bags, weight)
        assert own.dtype == dtype
        assert own.shape == (len(sizes), width)
        torch.testing.assert_close(own, twin, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_no_rows_at_all() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    out = ragged_sum(torch.empty(0, 8), nothing, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(3, 8))


def test_a_bag_does_not_depend_on_its_neighbours() -> None:
    """Sums of the same rows are the same bits wherever their bag is: who sums may differ."""
    rows = torch.randn(9, 200).to(torch.bfloat16)
    weight = torch.rand(4)
    member = torch.tensor([8, 3, 5, 0])
    alone = ragged_sum(rows, member, torch.tensor([4]), weight)
    among = ragged_sum(
        rows,
        torch.cat([torch.tensor([1, 1]), member, torch.tensor([2])]),
        torch.tensor([2, 4, 0, 1]),
        torch.cat([torch.rand(2), weight, torch.rand(1)]),
    )
    assert torch.equal(among[1], alone[0])


def test_weighted_rows_are_bags_of_one() -> None:
    rows, weight = torch.randn(5, 130).to(torch.bfloat16), torch.rand(4)
    names = torch.tensor([4, 0, 0, 2])
    own = weighted_rows(rows, names, weight)
    twin = rows[names].float() * weight.to(torch.bfloat16).float()[:, None]
    torch.testing.assert_close(own.float(), twin, rtol=2**-8, atol=0)  # rounded once
    nothing = weighted_rows(rows[:0], names[:0], weight[:0])
    assert nothing.shape == (0, 130)
