"""The two balance losses against loops over tokens and experts, values and gradients."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_config, training_context

from dualray.model.context import Routing
from dualray.model.router import Router, auxiliary_loss, sequence_balance_loss

T, E, K = 14, 8, 3


def drawn_routing(seed: int) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(T, E, generator=generator, dtype=torch.float64)
    scores_TE[:, 5] = 0.0  # an expert that nobody chooses
    gates_TK, experts_TK = scores_TE.topk(K)
    return Routing(
        experts_TK=experts_TK, gates_TK=gates_TK, scores_TE=scores_TE.clone().requires_grad_()
    )


def slow_loss(routing: Routing, seq_lens: tuple[int, ...]) -> torch.Tensor:
    """Equations 17 to 20 of arXiv 2412.19437 word by word, sequence after sequence."""
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length in seq_lens:
        tokens = range(start, start + length)
        for expert in range(E):
            chosen = sum(int(expert in routing.experts_TK[t].tolist()) for t in tokens)
            f = E / (K * length) * chosen
            p = sum(routing.scores_TE[t, expert] / routing.scores_TE[t].sum() for t in tokens)
            total = total + f * p / length
        start += length
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seq_lens", [(T,), (5, 9), (1, 12, 1)])
def test_losses_and_their_gradients_equal_loops(seed: int, seq_lens: tuple[int, ...]) -> None:
    routing = drawn_routing(seed)
    cases = ((sequence_balance_loss(routing, seq_lens), seq_lens), (auxiliary_loss(routing), (T,)))
    for found, lengths in cases:
        wanted = slow_loss(routing, lengths)
        ours, theirs = (torch.autograd.grad(loss, routing.scores_TE)[0] for loss in (found, wanted))
        # Sums of at most 14 float64 terms in another order.
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_balanced_micro_batch_has_a_loss_of_one() -> None:
    experts_TK = (torch.arange(16)[:, None] + torch.arange(2)) % E
    scores_TE = torch.full((16, E), 0.3, dtype=torch.float64)
    routing = Routing(
        experts_TK=experts_TK, gates_TK=scores_TE.gather(1, experts_TK), scores_TE=scores_TE
    )
    assert float(auxiliary_loss(routing)) == pytest.approx(1.0, rel=1e-14)
    # Everything on two experts that are the surest ones, too: E / K of it.
    collapsed = torch.zeros(16, E, dtype=torch.float64)
    collapsed[:, :2] = 1.0
    routing = Routing(
        experts_TK=torch.tensor([[0, 1]] * 16), gates_TK=collapsed[:, :2], scores_TE=collapsed
    )
    assert float(auxiliary_loss(routing)) == pytest.approx(E / 2, rel=1e-14)


def test_each_scale_adds_its_loss() -> None:
    """Through a router, down to its weights; scales of 0 add nothing."""
    config = tiny_config()
    router = Router(config, layer=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(0, 1, generator=generator)
    x_TD = torch.randn(T, config.hidden_size, generator=generator, dtype=torch.float64)

    def losses(sequence: float, aux: float) -> torch.Tensor | None:
        ctx = training_context(config, (5, 9), balance_scale=sequence)
        ctx.aux_scale = aux
        router(x_TD, ctx)
        return ctx.balance_loss()

    assert losses(0.0, 0.0) is None
    gradients = {}
    for scales in ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25)):
        loss = losses(*scales)
        assert loss is not None
        gradients[scales] = torch.autograd.grad(loss, router.weight)[0]
    summed = gradients[0.5, 0.0] + gradients[0.0, 0.25]
    torch.testing.assert_close(gradients[0.5, 0.25], summed, rtol=1e-12, atol=1e-15)
    ctx = training_context(config, (5, 9))
    routing = router(x_TD, ctx)
    slow = torch.autograd.grad(0.25 * slow_loss(routing, (T,)), router.weight)[0]
    torch.testing.assert_close(gradients[0.0, 0.25], slow, rtol=1e-10, atol=1e-14)
