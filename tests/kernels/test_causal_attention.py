"""Strips against torch's own attention, over head groups, widths and ragged last strips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualray.kernels import causal_attention as kernel

HEADS = {"mha": (3, 3), "gqa": (4, 2), "mqa": (3, 1)}


def _inputs(S: int, heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(S)
    H, G = heads
    # (B, S, heads, width) seen as (B, heads, S, width): the layout that the model passes.
    shapes = [(2, S, H, 10), (2, S, G, 10), (2, S, G, 6), (2, S, H, 6)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for shape in shapes
    ]


def _run(attend, inputs: list[Tensor]) -> list[Tensor]:
    *qkv, dy = inputs
    leaves = [t.detach().requires_grad_() for t in qkv]
    out = attend(*leaves, 0.3)
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


@pytest.mark.parametrize("S", [96, 128, 130, 300])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("keeps", [False, True], ids=["recomputed", "kept"])
def test_output_and_gradients_equal_torch(keeps, heads, S, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_keeps_probabilities", lambda *_: keeps)
    monkeypatch.setattr(kernel, "_TILE_NUMEL", 2 * 128 * S)
    inputs = _inputs(S, heads, torch.float64)
    assert S >= kernel._MIN_STRIPS_LEN
    for own, twin in zip(
        _run(kernel.causal_attention, inputs), _run(kernel.torch_attention, inputs)
    ):
        torch.testing.assert_close(own, twin, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str
)
@pytest.mark.parametrize("keeps", [False, True], ids=["recomputed", "kept"])
def test_low_precision_is_as_near_to_float64_as_torch_is(keeps, dtype, bound, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "_keeps_probabilities", lambda *_: keeps)
    inputs = [t * 3 for t in _inputs(260, (4, 2), dtype)]
    exact = _run(kernel.torch_attention, [t.double() for t in inputs])
    own = _run(kernel.causal_attention, inputs)
    for got, want in zip(own, exact):
        assert got.dtype == dtype
        # bf16 rounds probabilities and both factors of each product: a few times 2^-9.
        assert (got.double() - want).norm() <= bound * want.norm()


def test_large_logits_are_not_rounded_to_bfloat16() -> None:
    # Logits 136 and 137.06; bf16 has only 136 and 137 there, which is 0.012 off in the output.
    q = torch.full((1, 1, 128, 1), 200.0, dtype=torch.bfloat16)
    k = torch.ones(1, 1, 128, 1, dtype=torch.bfloat16)
    k[:, :, 1::2] = 1 + 2**-7
    v = k.clone()
    p = torch.softmax(torch.tensor([1.0, 1 + 2**-7]) * 200.0 * 0.68, 0)
    out = kernel.causal_attention(q, k, (v - 1) * 128, 0.68)
    assert out[0, 0, -1, 0].item() == pytest.approx(p[1].item(), abs=4e-3)


def test_no_row_sees_the_future() -> None:
    q, k, v, _ = _inputs(200, (2, 2), torch.float32)
    before = kernel.causal_attention(q, k, v, 0.3)
    k[:, :, 150:] += 1
    v[:, :, 150:] = 7
    after = kernel.causal_attention(q, k, v, 0.3)
    assert torch.equal(before[:, :, :150], after[:, :, :150])
    assert not torch.allclose(before[:, :, 150:], after[:, :, 150:])


def test_probabilities_are_kept_while_they_are_no_larger_than_the_rest(monkeypatch) -> None:
    q, k, v, _ = _inputs(128, (2, 2), torch.float64)
    assert kernel._keeps_probabilities(64, 10, 6)
    assert not kernel._keeps_probabilities(65, 10, 6)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        kernel.causal_attention(q.requires_grad_(), k, v, 0.3)
    assert len(saved) == 3  # query, key and value


def test_inputs_of_any_layout() -> None:
    inputs = _inputs(100, (4, 2), torch.float64)
    expected = _run(kernel.causal_attention, inputs)
    packed = [t.contiguous() for t in inputs]
    for own, want in zip(_run(kernel.causal_attention, packed), expected):
        torch.testing.assert_close(own, want, rtol=1e-12, atol=1e-12)


def test_short_sequences_take_torchs_kernel() -> None:
    q, k, v, _ = _inputs(kernel._MIN_STRIPS_LEN - 1, (4, 2), torch.float32)
    own = kernel.causal_attention(q, k, v, 0.3)
    assert torch.equal(own, kernel.torch_attention(q, k, v, 0.3))
