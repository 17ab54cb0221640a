"""The fused head and loss against all logits at once, with every edge of the chunks."""

from __future__ import annotations

import pytest
import torch

from dualray.kernels import cross_entropy
from dualray.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def _inputs(T: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(T)
    x = torch.randn(T, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(29, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(29, (T,), generator=generator)
    labels[::3] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("T", [1, 7, 8, 9, 24])
def test_loss_and_gradients_equal_the_twin(T, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    x, weight, labels = _inputs(T)
    results = []
    for loss_of in (linear_cross_entropy, linear_cross_entropy_reference):
        loss = loss_of(x, weight, labels)
        results.append((loss, *torch.autograd.grad(loss * 0.37, (x, weight))))
    for own, twin in zip(*results):
        torch.testing.assert_close(own, twin, rtol=1e-12, atol=1e-12)


def test_weight_gradient_is_handed_over_and_added(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 8)
    x, weight, labels = _inputs(20)
    (expected,) = torch.autograd.grad(linear_cross_entropy_reference(x, weight, labels), weight)
    pending = []
    loss = linear_cross_entropy(x, weight, labels, lambda *job: pending.append(job))
    (loss * 0.5).backward()
    assert weight.grad is None
    ((target, accumulate),) = pending
    assert target is weight
    main_grad = torch.ones_like(weight)
    with torch.no_grad():
        accumulate(main_grad)
        accumulate(main_grad)
    torch.testing.assert_close(main_grad, 1 + expected, rtol=1e-12, atol=1e-12)


def test_all_labels_ignored_gives_zeros() -> None:
    x, weight, labels = _inputs(5)
    loss = linear_cross_entropy(x, weight, labels.fill_(-1))
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss.item() == 0
    assert not any(grad.any() for grad in grads)


def test_without_gradients_the_loss_alone_is_computed(monkeypatch) -> None:
    x, weight, labels = _inputs(9)
    expected = linear_cross_entropy(x, weight, labels).detach()
    monkeypatch.setattr(cross_entropy, "_add_mm", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), expected)


def test_bfloat16_is_summed_in_fp32(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 16)
    x, weight, labels = _inputs(400, torch.bfloat16)
    loss = linear_cross_entropy(x, weight, labels)
    grads = torch.autograd.grad(loss, (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = linear_cross_entropy_reference(*wide, labels)
    exact_grads = torch.autograd.grad(exact, wide)
    assert loss.dtype == torch.float32
    # Logits are rounded to bf16 as a head's are; the sum of 400 is not.
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for own, want in zip(grads, exact_grads):
        assert (own.double() - want).norm() <= 1e-2 * want.norm()


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    x = torch.tensor([[300.0], [300.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    own = linear_cross_entropy(x, weight, labels)
    assert own.item() == 600.0
    grads = torch.autograd.grad(own, (x, weight))
    twin = torch.autograd.grad(linear_cross_entropy_reference(x, weight, labels), (x, weight))
    torch.testing.assert_close(grads, twin)
