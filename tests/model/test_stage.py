"""The split backward against plain autograd, packing, and stages by range."""

from __future__ import annotations

import pytest
import torch
from support.models import (
    attention_changes,
    forward_losses,
    random_batch,
    tiny_config,
    training_context,
    whole_model,
)

from dualray.model.init import logical_slices, logical_tensors
from dualray.model.stage import Stage


class CollectingSink:
    """Runs every weight gradient at the end, newest first: the order must not matter."""

    def __init__(self) -> None:
        self.pending = []

    def submit(self, weight, accumulate) -> None:
        self.pending.append((weight, accumulate))

    @torch.no_grad()
    def run(self) -> None:
        while self.pending:
            weight, accumulate = self.pending.pop()
            accumulate(weight.main_grad)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True},
        attention_changes("gqa") | {"attention_bias": True},
    ],
    ids=["untied", "tied-bias", "gqa-bias"],
)
def test_deferred_weight_gradients_equal_plain_autograd(changes: dict) -> None:
    config = tiny_config(**changes)
    ids, labels = random_batch(config, 3, 16)
    grads = []
    for sink in (None, CollectingSink()):
        stage = whole_model(config, dtype=torch.float64)
        for parameter in stage.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
        ctx = training_context(config, (16, 16, 16), sink=sink, balance_scale=0.01)
        losses = forward_losses(stage, ids, labels, ctx)
        (losses.main + 0.3 * sum(losses.mtp) + ctx.balance_loss()).backward()
        if sink is not None:
            sink.run()
        grads.append({
            name: p.main_grad + (0 if p.grad is None else p.grad)
            for name, p in stage.named_parameters()
        })  # fmt: skip
    for name, plain in grads[0].items():
        assert plain.norm() > 0, f"{name} has no gradient"
        assert (plain - grads[1][name]).norm() <= 1e-12 * plain.norm(), name


def test_ragged_sequences_attend_only_within_themselves() -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    stage = whole_model(config, dtype=torch.float64)
    ids = torch.randint(config.vocab_size, (20,), generator=torch.Generator().manual_seed(1))
    together = training_context(config, (7, 7, 6))
    packed = stage(stage.embed(ids, together), together)
    for start, length in ((0, 7), (7, 7), (14, 6)):
        alone = training_context(config, (length,))
        piece = stage(stage.embed(ids[start : start + length], alone), alone)
        torch.testing.assert_close(packed[start : start + length], piece, atol=1e-12, rtol=0)


def test_attention_refuses_lengths_that_do_not_cover_the_tokens() -> None:
    config = tiny_config()
    stage = whole_model(config)
    ctx = training_context(config, (5,))
    ctx.positions_T = torch.arange(6)
    with pytest.raises(AssertionError, match="sum to 5, tokens are 6"):
        stage(stage.embed(torch.arange(6), ctx), ctx)


def test_logical_slices_cover_every_parameter_once() -> None:
    config = tiny_config()
    halves = [
        Stage(config, range(0, 2), expert_ids=lambda layer: (1, 4)),
        Stage(config, range(2, 4), expert_ids=lambda layer: (1, 4)),
    ]
    names: list[str] = []
    for stage in halves:
        tensors = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
        slices = logical_slices(stage)
        assert slices.keys() == tensors.keys()
        for name, parts in slices.items():
            assert sum(part.numel for part in parts) == tensors[name].numel()
            names += [part.name for part in parts]
    assert len(names) == len(set(names))
    whole = set(logical_tensors(whole_model(config)))
    others = {n for n in whole if any(f".experts.{e}." in n for e in (0, 2, 3, 5, 6, 7))}
    assert set(names) == whole - others


def test_layers_by_range_give_the_whole_model() -> None:
    config = tiny_config(num_nextn_predict_layers=0)
    whole = whole_model(config)
    source = logical_tensors(whole)
    ids, _ = random_batch(config, 1, 12)
    ctx = training_context(config, (12,))
    expected = whole.logits(whole(whole.embed(ids.flatten(), ctx), ctx), ctx)
    stages = [Stage(config, range(0, 1)), Stage(config, range(1, 3)), Stage(config, range(3, 4))]
    for stage in stages:
        for name, view in logical_tensors(stage).items():
            view.copy_(source[name])
    ctx = training_context(config, (12,))
    x = stages[0].embed(ids.flatten(), ctx)
    for stage in stages:
        x = stage(x, ctx)
    assert torch.equal(stages[-1].logits(x, ctx), expected)
