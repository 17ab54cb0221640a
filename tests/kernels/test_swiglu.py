from __future__ import annotations

import pytest
import torch

from dualray.kernels import blocks
from dualray.kernels.swiglu import swiglu, swiglu_grad_, swiglu_into, swiglu_reference


@pytest.mark.parametrize("shape", [(5, 14), (0, 8), (12, 2)], ids=str)
def test_output_and_gradient_equal_the_twin(shape, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_NUMEL", 28)  # two rows of 14
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
    out, twin = swiglu(x), swiglu_reference(x)
    assert torch.equal(out, twin)
    dy = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    (own,), (expected,) = (torch.autograd.grad(y, x, dy) for y in (out, twin))
    # The derivative of silu is written differently inside torch.
    torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-14)


def test_bfloat16_output_has_the_same_bits() -> None:
    x = torch.randn(33, 64, generator=torch.Generator().manual_seed(1)).bfloat16() * 4
    assert torch.equal(swiglu(x), swiglu_reference(x))


def test_rows_that_are_not_contiguous() -> None:
    x = torch.randn(4, 20, dtype=torch.float64)[:, 3:13].requires_grad_()
    dy = torch.randn(5, 4, dtype=torch.float64).t()
    (own,), (expected,) = (torch.autograd.grad(f(x), x, dy) for f in (swiglu, swiglu_reference))
    torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_place_it_gives_the_same_bits(dtype, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK_NUMEL", 28)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 14, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(5, 7, generator=generator).to(dtype)
    out = swiglu(x)
    (grad,) = torch.autograd.grad(out, x, dy)
    own, silu, overwritten = torch.empty_like(dy), torch.empty_like(dy), x.detach().clone()
    swiglu_into(overwritten, own, own)
    assert torch.equal(own, out)
    swiglu_into(overwritten, silu, own)
    assert torch.equal(own, out)
    swiglu_grad_(overwritten, silu, dy)
    assert torch.equal(silu, out)
    assert torch.equal(overwritten, grad)
