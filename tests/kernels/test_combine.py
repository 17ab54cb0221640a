from __future__ import annotations

import pytest
import torch

from dualray.kernels.combine import (
    combine,
    combine_reference,
    gate_grads,
    gate_grads_reference,
)
from dualray.kernels.permute import sort_by_key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("T", [0, 1, 23])
def test_output_and_gradients_equal_the_twin(T, multiple, dtype) -> None:
    generator = torch.Generator().manual_seed(T)
    choices_TK = torch.rand(T, 6, generator=generator).topk(3).indices
    order, inverse, _ = sort_by_key(choices_TK.flatten(), 6, multiple)
    # Rows of padding hold anything: nothing of it may come back.
    y = torch.randn(order.numel(), 5, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(T, 3, generator=generator)
    gates = gates.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    dy = torch.randn(T, 5, generator=generator).to(dtype)
    results = []
    for function in (combine, combine_reference):
        out = function(y, gates, order, inverse)
        results.append((out, *torch.autograd.grad(out, (y, gates), dy)))
    for own, twin in zip(*results):
        assert own.dtype == twin.dtype
        # The twin sums 3 products of the output and 5 of the gates' gradient in another order, and
        # both round once to bf16, halves not always to even.
        bound = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(own, twin, rtol=bound, atol=bound)
    if multiple > 1:
        assert not results[0][1][order < 0].any()


def test_without_gradients_the_output_is_the_same() -> None:
    order, inverse, _ = sort_by_key(torch.tensor([1, 0, 1, 2]), 3)
    y, gates = torch.randn(4, 7), torch.rand(2, 2)
    with torch.no_grad():
        plain = combine(y, gates, order, inverse)
    assert torch.equal(plain, combine(y, gates, order, inverse))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [0, 1, 9])
def test_gradients_of_gates_equal_the_twin(T, dtype) -> None:
    """Rows 64 wide: the sums are in fp32, and rounded to bf16 once."""
    generator = torch.Generator().manual_seed(T)
    row_TK = torch.randperm(3 * T, generator=generator).view(T, 3)
    y = torch.randn(3 * T, 64, generator=generator).to(dtype)
    dy = torch.randn(64, T, generator=generator).to(dtype).t()  # not contiguous
    own, twin = gate_grads(y, dy, row_TK), gate_grads_reference(y, dy, row_TK)
    assert (own.dtype, own.shape) == (dtype, (T, 3))
    bound = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(own, twin, rtol=bound, atol=bound)
