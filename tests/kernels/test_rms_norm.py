from __future__ import annotations

import pytest
import torch

from dualray.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(7, 12), (0, 4), (2, 3, 5), (3, 1)], ids=str)
def test_output_and_gradients_equal_the_twin(shape) -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in "xy")
    weight = torch.rand(shape[-1], dtype=torch.float64, generator=generator) + 0.5
    leaves = (x.requires_grad_(), weight.requires_grad_())
    results = []
    for norm in (rms_norm, rms_norm_reference):
        out = norm(*leaves, 0.1)
        results.append((out, *torch.autograd.grad(out, leaves, dy)))
    for own, expected in zip(*results):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-13)


def test_bfloat16_is_rounded_before_the_weight_as_hugging_face_does() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64, 48, generator=generator).bfloat16() * 30
    weight = (torch.rand(48, generator=generator) + 0.5).bfloat16()
    out = rms_norm(x, weight, 1e-6)
    twin = rms_norm_reference(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16
    # The sum of squares is in another order, so a value next to a rounding edge may cross it.
    assert (out != twin).double().mean() < 0.002
    late = (rms_norm_reference(x.float(), weight.float(), 1e-6)).bfloat16()
    assert (out != late).double().mean() > 0.1


def test_bfloat16_gradients_are_near_those_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(300, 32, generator=generator).bfloat16() for _ in "xy")
    weight = (torch.rand(32, generator=generator) + 0.5).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight)]
        norm = rms_norm if dtype == torch.bfloat16 else rms_norm_reference
        grads.append(torch.autograd.grad(norm(*leaves, 1e-6), leaves, dy.to(dtype)))
    for own, exact in zip(*grads):
        # Computed in fp32 and rounded once: half of 2^-8 at most, 0.29 of that on average.
        assert (own.double() - exact).norm() <= 2**-9 * exact.norm()


def test_the_input_may_be_a_slice_of_wider_rows() -> None:
    x = torch.randn(6, 10, dtype=torch.float64)[:, 2:7].requires_grad_()
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 6, dtype=torch.float64).t()
    own = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), dy)
    twin = torch.autograd.grad(rms_norm_reference(x, weight, 1e-6), (x, weight), dy)
    torch.testing.assert_close(own, twin, rtol=1e-12, atol=1e-13)
