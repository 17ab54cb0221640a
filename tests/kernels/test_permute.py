"""Rows in expert order with and without padding: what comes back must not know of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from dualray.kernels.permute import permute, replicate, sort_by_key


@pytest.mark.parametrize("keys", [[2, 0, 2, 5, 0, 2, 2], [], [3], [4] * 8], ids=str)
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_every_key_starts_at_a_multiple(keys, multiple) -> None:
    key = torch.tensor(keys, dtype=torch.int64)
    order, inverse, rows = sort_by_key(key, 6, multiple)
    assert rows.shape == (6,)
    assert order.numel() == rows.sum()
    starts = [0, *rows.cumsum(0).tolist()]
    for k, (start, end) in enumerate(pairwise(starts)):
        here = order[start:end]
        real = here[here >= 0]
        # Stable: inputs in order, padding behind them, less than one multiple of it.
        assert real.tolist() == [i for i, value in enumerate(keys) if value == k]
        assert torch.equal(here[: real.numel()], real)
        assert (end - start) % multiple == 0
        assert end - start - real.numel() < multiple
    assert torch.equal(order[inverse], torch.arange(key.numel()))


def test_padding_changes_no_value_and_no_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.randint(0, 5, (9, 3), generator=generator)
    x = torch.randn(9, 4, generator=generator, requires_grad=True)
    weight = torch.randn(27, 4, generator=generator)
    results = []
    for multiple in (1, 8):
        order, inverse, rows = sort_by_key(experts_TK.flatten(), 5, multiple)
        sorted_rows = replicate(x, order, inverse)
        assert not sorted_rows[order < 0].any()
        expert = torch.repeat_interleave(torch.arange(5), rows)
        # Padding that an expert turned into something else must be dropped on the way back.
        out = permute(sorted_rows * 3 + expert[:, None] + 1, inverse, order)
        (grad,) = torch.autograd.grad(out, x, weight)
        results.append((out, grad))
    for plain, padded in zip(*results):
        assert torch.equal(plain, padded)


def test_gradients_of_padded_gathers_are_exact() -> None:
    key = torch.tensor([1, 0, 1, 1, 3, 0])
    order, inverse, _ = sort_by_key(key, 4, 4)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: replicate(t, order, inverse), x)
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, order, inverse), rows)
    padded = torch.randn(order.numel(), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, inverse, order), padded)
    (grad,) = torch.autograd.grad(permute(padded, inverse, order).sum(), padded)
    assert torch.equal(grad.sum(1), 3.0 * (order >= 0))


def test_no_rows_at_all_with_padding() -> None:
    order, inverse, rows = sort_by_key(torch.empty(0, dtype=torch.int64), 4, 64)
    assert rows.tolist() == [0, 0, 0, 0]
    x = torch.empty(0, 8, requires_grad=True)
    out = permute(replicate(x, order, inverse), inverse, order)
    out.sum().backward()
    assert out.shape == (0, 8)
    assert x.grad is not None
    assert x.grad.shape == (0, 8)
