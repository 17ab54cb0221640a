"""Padded expert groups behind a real exchange of rows."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import tiny_config
from support.processes import free_port, run_ranks

from dualray.model.context import Routing
from dualray.parallel import dispatch as module
from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.slots import contiguous_placement

RANKS = 2
LAYER = 1


def _there_and_back(rank: int, port: int) -> list[list[np.ndarray]]:
    """Outputs and gradients without padding and with it."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    config = tiny_config()
    generator = torch.Generator().manual_seed(rank)
    # Ranks hold different numbers of tokens, and nobody chooses the last two experts.
    num_tokens = 5 + 8 * rank
    x = torch.randn(num_tokens, config.hidden_size, generator=generator, requires_grad=True)
    scores = torch.rand(num_tokens, config.n_routed_experts, generator=generator)
    scores[:, -2:] = 0
    gates, chosen = scores.topk(config.num_experts_per_tok)
    gates.requires_grad_()
    routing = Routing(experts_TK=chosen, gates_TK=gates, scores_TE=scores)
    dy = torch.randn(x.shape, generator=generator)
    group = dist.group.WORLD
    assert group is not None
    ways = Ways(rows=group, gradients=group)
    placement = contiguous_placement(config, RANKS)
    results = []
    for multiple in (1, 4):
        with mock.patch.object(module, "row_multiple", lambda *_, multiple=multiple: multiple):
            own = AllToAllDispatch(placement, ways, torch.device("cpu"), Exchange())
            dispatched = own.dispatch(LAYER, x, routing)
        assert all(end % multiple == 0 for end in dispatched.offsets.tolist())
        slot = torch.bucketize(
            torch.arange(len(dispatched.rows_ND)), dispatched.offsets.long(), right=True
        )
        out = own.combine(dispatched.rows_ND * (slot[:, None] + 2.0) + 1, dispatched)
        grads = torch.autograd.grad(out, (x, gates), dy)
        results.append([out.detach().numpy(), *(grad.numpy() for grad in grads)])
    dist.destroy_process_group()
    return results


@pytest.mark.multiproc
def test_padding_behind_the_exchange_changes_no_bit() -> None:
    for plain, padded in run_ranks(_there_and_back, RANKS, free_port()):
        assert any(array.any() for array in plain)
        for own, twin in zip(padded, plain):
            assert np.array_equal(own, twin)
