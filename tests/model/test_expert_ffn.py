"""The experts' FFN as one function against grouped layers, gradients through a sink in both."""

from __future__ import annotations

import pytest
import torch

from dualray.model.expert_ffn import expert_ffn, expert_ffn_reference
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads

SIZES = [70, 0, 61, 130]


def layer(dtype: torch.dtype):
    """Rows, weights with sums for their gradients, a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator).to(dtype) * shape[-1] ** -0.5
        for shape in ((sum(SIZES), 16), (4, 48, 16), (4, 16, 24), (sum(SIZES), 16))
    ]
    rows, gate_up, down, dy = tensors
    weights = torch.nn.ParameterList([gate_up, down])
    attach_main_grads(weights)
    return rows.requires_grad_(), weights, dy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deferred", [False, True])
def test_output_and_gradients_equal_the_twin(dtype, deferred) -> None:
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    results = []
    for function in (expert_ffn, expert_ffn_reference):
        rows, weights, dy = layer(dtype)
        sink = WeightGrads()
        out = function(rows, *weights, offsets, sink)
        if deferred:
            with sink.deferring():
                out.backward(dy)
            assert not any(weight.main_grad.any() for weight in weights)
            sink.run_oldest()
        else:
            out.backward(dy)
        results.append((out.detach(), rows.grad, *(weight.main_grad for weight in weights)))
        assert all(weight.grad is None for weight in weights)
        is_one_function = type(out.grad_fn).__name__ == "_ExpertFfnBackward"
        assert is_one_function == (function is expert_ffn)
    # The same products in the same order; rounding of sums on top of others, and of the twin's
    # gradient of silu in bf16.
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for own, twin in zip(*results):
        assert own.dtype == twin.dtype
        assert float((own - twin).norm()) <= bound * float(twin.norm())


def test_without_gradients_the_output_is_the_same() -> None:
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    rows, weights, _ = layer(torch.float32)
    trained = expert_ffn(rows, *weights, offsets, WeightGrads())
    with torch.no_grad():
        assert torch.equal(trained, expert_ffn(rows, *weights, offsets, None))


def test_few_rows_without_a_sink_and_groups_of_one_size_go_to_the_twin() -> None:
    rows, weights, _ = layer(torch.float32)
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    few = torch.tensor([2, 2, 3, 9], dtype=torch.int32)
    for out in (
        expert_ffn(rows, *weights, offsets, None),
        expert_ffn(rows[:9], *weights, few, WeightGrads()),
    ):
        assert type(out.grad_fn).__name__ != "_ExpertFfnBackward"
    with torch.no_grad():
        equal = expert_ffn(rows[:256], *weights, 64, None)
        ragged = expert_ffn(rows[:256], *weights, torch.arange(64, 257, 64), None)
    torch.testing.assert_close(equal, ragged, rtol=1e-5, atol=1e-5)


def test_a_second_backward_is_refused() -> None:
    """The first has written over what it kept."""
    rows, weights, dy = layer(torch.float32)
    offsets = torch.tensor(SIZES).cumsum(0).to(torch.int32)
    out = expert_ffn(rows, *weights, offsets, WeightGrads())
    out.backward(dy, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dy)
