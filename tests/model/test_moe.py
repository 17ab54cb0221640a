"""A MoE layer with padded expert groups against one without: outputs and weight gradients."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_config

from dualray.kernels.grouped_gemm import equal_groups_pay, row_multiple
from dualray.model import moe
from dualray.model.context import Routing
from dualray.model.moe import Experts, LocalDispatch


def test_large_groups_are_padded_in_bfloat16_on_a_cpu_only() -> None:
    like = torch.empty(0, dtype=torch.bfloat16)
    assert row_multiple(like, 63) == 1  # so few different row counts are soon all compiled
    rows = (64, 1024, 2047, 2048, 4095, 4096, 100_000)
    assert [row_multiple(like, n) for n in rows] == [16, 16, 16, 32, 32, 64, 64]
    for dtype in (torch.float32, torch.float64):
        assert row_multiple(torch.empty(0, dtype=dtype), 64) == 1
    assert row_multiple(torch.empty(0, dtype=torch.bfloat16, device="meta"), 64) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_padding_changes_neither_outputs_nor_weight_gradients(dtype, monkeypatch) -> None:
    # One column in 16 and a multiple of 4 rows: the padded products are aligned in fp32 too.
    config = tiny_config(hidden_size=16, moe_intermediate_size=8)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(config, tuple(range(config.n_routed_experts))).to(dtype)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0, 0.3, generator=generator)
    x = torch.randn(21, 16, generator=generator).to(dtype).requires_grad_()
    scores = torch.rand(21, config.n_routed_experts, generator=generator).to(dtype)
    scores[:, 3] = 0  # an expert that nobody chooses
    gates, chosen = scores.topk(3)
    routing = Routing(experts_TK=chosen, gates_TK=gates.clone().requires_grad_(), scores_TE=scores)
    dy = torch.randn(21, 16, generator=generator).to(dtype)
    results = []
    for multiple in (1, 8):
        monkeypatch.setattr(moe, "row_multiple", lambda like, rows, multiple=multiple: multiple)
        dispatch = LocalDispatch(config.n_routed_experts)
        dispatched = dispatch.dispatch(0, x, routing)
        assert all(end % multiple == 0 for end in dispatched.offsets.tolist())
        out = dispatch.combine(experts(dispatched.rows_ND, dispatched.offsets, None), dispatched)
        leaves = (x, routing.gates_TK, *experts.parameters())
        results.append((out, *torch.autograd.grad(out, leaves, dy)))
    for plain, padded in zip(*results):
        # Zero rows add zeros; a product with more rows may sum its inner dim in another order.
        bound = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(plain, padded, rtol=bound, atol=bound)


@pytest.mark.parametrize("num_tokens", [3, 16])
def test_a_few_tokens_at_all_experts_give_what_sorted_ones_give(num_tokens, monkeypatch) -> None:
    assert equal_groups_pay(torch.empty(0, dtype=torch.bfloat16))
    assert not equal_groups_pay(torch.empty(0))
    monkeypatch.setattr(moe, "equal_groups_pay", lambda like: True)
    config = tiny_config()
    generator = torch.Generator().manual_seed(0)
    experts = Experts(config, tuple(range(config.n_routed_experts))).double()
    x = torch.randn(num_tokens, config.hidden_size, generator=generator).double()
    scores = torch.rand(num_tokens, config.n_routed_experts, generator=generator).double()
    gates, chosen = scores.topk(3)
    routing = Routing(experts_TK=chosen, gates_TK=gates, scores_TE=scores)
    dispatch = LocalDispatch(config.n_routed_experts)
    outs, groups = [], []
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0, 0.3, generator=generator)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            dispatched = dispatch.dispatch(0, x, routing)
            groups.append(isinstance(dispatched.offsets, int))
            rows = experts(dispatched.rows_ND, dispatched.offsets, None)
            outs.append(dispatch.combine(rows, dispatched).detach())
    assert groups == [False, True]
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
