"""Every layout computes the one-process model's loss and gradients, in float64.

The reference is plain autograd over the whole model. All processes go through all layouts
in turn, so joining again and again in a living process is tested with them.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.models import forward_losses, random_batch, tiny_config, training_context, whole_model
from support.processes import free_port, run_ranks
from support.walks import make_walker

from dualray.model.config import ModelConfig
from dualray.model.init import logical_slices
from dualray.parallel.groups import leave
from dualray.parallel.held import EMBEDDING
from dualray.parallel.layout import Layout
from dualray.parallel.micro_batch import Objective

WORLD = 4
GLOBAL_MICRO_BATCHES = 8
SEQUENCES, SEQ_LEN = 2, 10
LAYOUTS = [
    Layout(pipeline=2, experts=2, schedule="dualpipe"),
    Layout(pipeline=4, experts=1, schedule="dualpipe"),
    Layout(pipeline=2, experts=2, schedule="1f1b"),
    Layout(pipeline=4, experts=1, schedule="1f1b"),
    Layout(pipeline=2, experts=1, replicas=2, schedule="dualpipe"),
    Layout(pipeline=1, experts=4, schedule="1f1b"),
    Layout(pipeline=2, experts=2, schedule="dualpipev"),
    Layout(pipeline=1, experts=4, schedule="dualpipev"),
    Layout(pipeline=2, replicas=2, schedule="dualpipev", layers=(1, 2, 1, 1)),
    Layout(pipeline=4, schedule="zb1p", layers=(2, 1, 1, 1)),
    Layout(pipeline=2, experts=2, schedule="zb1p"),
    Layout(pipeline=4, schedule="gpipe"),
]


def objective(config: ModelConfig) -> Objective:
    targets = GLOBAL_MICRO_BATCHES * SEQUENCES * SEQ_LEN
    depths = config.num_nextn_predict_layers
    return Objective(
        main=1 / targets,
        mtp=(0.3 / depths / targets,) * depths,
        balance=0.01 / (GLOBAL_MICRO_BATCHES * SEQUENCES),
    )


def global_batch(config: ModelConfig):
    ids, labels = random_batch(config, GLOBAL_MICRO_BATCHES * SEQUENCES, SEQ_LEN, seed=3)
    return (
        ids.view(GLOBAL_MICRO_BATCHES, SEQUENCES, SEQ_LEN),
        labels.view(-1, GLOBAL_MICRO_BATCHES, SEQUENCES, SEQ_LEN),
    )


def reference(config: ModelConfig):
    """Loss sums, balance loss and gradients by logical name, by plain autograd."""
    stage = whole_model(config, dtype=torch.float64)
    ids, labels = global_batch(config)
    goal = objective(config)
    main, mtp, balance, loads = 0.0, 0.0, 0.0, {}
    for index in range(GLOBAL_MICRO_BATCHES):
        ctx = training_context(config, (SEQ_LEN,) * SEQUENCES, balance_scale=goal.balance)
        losses = forward_losses(stage, ids[index], labels[:, index], ctx)
        balance_loss = ctx.balance_loss()
        (goal.of(losses) + balance_loss).backward()
        main += losses.main.item()
        mtp += sum(loss.item() for loss in losses.mtp)
        balance += balance_loss.item()
        for layer, counts in ctx.loads.items():
            loads[layer] = loads.get(layer, 0) + counts
    parameters = dict(stage.named_parameters())
    gradients = {}
    for name, parts in logical_slices(stage).items():
        if name in parameters:
            flat = parameters[name].grad.view(-1)
            for part in parts:
                gradients[part.name] = flat[part.start : part.start + part.numel]
    return main, mtp, balance, {k: v.tolist() for k, v in loads.items()}, gradients


def run_layouts(rank: int, config: ModelConfig, ports: list[int]):
    return [run_layout(rank, config, lay, port) for lay, port in zip(LAYOUTS, ports)]


def run_layout(rank: int, config: ModelConfig, layout: Layout, port: int):
    worker = make_walker(rank, config, layout, port, global_micro_batches=GLOBAL_MICRO_BATCHES)
    held, groups = worker.held, worker.groups
    dense, experts = held.dense_parameters(), held.expert_parameters()
    ids, labels = global_batch(config)
    lengths = (SEQ_LEN,) * SEQUENCES
    packed = [(ids[n].flatten(), labels[:, n].flatten(1), lengths) for n in range(len(ids))]
    sums = worker.walk(packed, objective(config))
    worker.executor.close()
    totals = torch.tensor([sums.main, sum(sums.mtp), sums.balance], dtype=torch.float64)
    dist.all_reduce(totals)
    for name, parameter in dense.items():
        assert parameter.grad is None
        if name == EMBEDDING and groups.embedding is not None:
            dist.all_reduce(parameter.main_grad, group=groups.embedding)
        else:
            dist.all_reduce(parameter.main_grad, group=groups.dense)
    if held.embedding_copy is not None:
        dist.all_reduce(held.embedding_copy.weight.main_grad, group=groups.embedding)
    for parameter in experts.values():
        dist.all_reduce(parameter.main_grad, group=groups.expert)
    gradients = {}
    for name, parts in held.slices().items():
        if name in dense or name in experts:
            flat = (dense | experts)[name].main_grad.view(-1)
            for part in parts:
                gradients[part.name] = flat[part.start : part.start + part.numel].numpy()
    for layer, counts in sums.loads.items():
        dist.all_reduce(counts, group=groups.dense)
        sums.loads[layer] = counts.tolist()
    leave()
    return totals.tolist(), gradients, sums.loads


@pytest.mark.multiproc
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_equal_the_one_process_model(tied: bool) -> None:
    config = tiny_config(num_hidden_layers=5, tie_word_embeddings=tied)
    main, mtp, balance, loads, gradients = reference(config)
    ports = [free_port() for _ in LAYOUTS]
    results = run_ranks(run_layouts, WORLD, config, ports)
    for index, layout in enumerate(LAYOUTS):
        seen = set()
        for rank in range(WORLD):
            totals, found, found_loads = results[rank][index]
            # float64: only the order of sums differs.
            assert totals == pytest.approx([main, mtp, balance], rel=1e-9), layout
            for name, gradient in found.items():
                expected = gradients[name]
                difference = (torch.from_numpy(gradient) - expected).norm()
                assert difference <= 1e-9 * expected.norm(), (layout, rank, name)
                seen.add(name)
            for layer, counts in found_loads.items():
                assert counts == loads[layer], (layout, rank, layer)
        assert seen == gradients.keys(), layout
