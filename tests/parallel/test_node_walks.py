"""Whole walks with experts over nodes, against the same walks with flat dispatch."""

from __future__ import annotations

import hashlib

import pytest
import torch
from support.models import random_batch, tiny_config
from support.processes import free_port, run_ranks
from support.walks import make_walker

from dualray.model.config import ModelConfig
from dualray.parallel.groups import leave
from dualray.parallel.layout import Layout
from dualray.parallel.micro_batch import Objective
from dualray.parallel.nodes import NodeMap
from dualray.parallel.spans import COMMUNICATION

MICRO_BATCHES = 12
WORLD = 4
LAYOUTS = [
    (Layout(pipeline=2, experts=2, schedule="dualpipe"), NodeMap(node_of=(0, 1))),
    (Layout(pipeline=1, experts=4, schedule="dualpipev"), NodeMap(node_of=(0, 1, 1, 0))),
]
MODES = [
    {"with_nodes": False},
    {"with_nodes": True},
    {"with_nodes": True, "overlapped": False},
    {"with_nodes": True, "fp8": True},
]


def _walk(rank: int, config: ModelConfig, ports: list[int]):
    found = []
    packed = []
    for number in range(MICRO_BATCHES):
        lengths = ((9, 11, 5), (17,), (4, 25), (13, 13))[number % 4]
        ids, labels = random_batch(config, 1, sum(lengths), seed=number)
        packed.append((ids[0], labels[:, 0], lengths))
    for layout, nodes in LAYOUTS:
        for mode in MODES:
            worker = make_walker(
                rank,
                config,
                layout,
                ports[len(found)],
                global_micro_batches=MICRO_BATCHES,
                overlapped=mode.get("overlapped", True),
                nodes=nodes if mode["with_nodes"] else None,
                fp8=mode.get("fp8", False),
            )
            sums = worker.walk(packed, Objective(main=1e-2, mtp=(3e-3, 3e-3), balance=1e-3))
            worker.executor.close()
            grads = {name: p.main_grad.clone().numpy() for name, p in worker.parameters().items()}
            losses = (sums.main, *sums.mtp, sums.balance)
            crossings = sum(
                category == COMMUNICATION and "across nodes" in name
                for name, category, _, _ in sums.spans.taken
            )
            found.append((losses, grads, crossings))
            leave()
    return found


@pytest.mark.multiproc
def test_walks_over_nodes_equal_flat_ones() -> None:
    config = tiny_config(num_hidden_layers=8)
    ports = [free_port() for _ in range(len(LAYOUTS) * len(MODES))]
    for found in run_ranks(_walk, WORLD, config, ports):
        for at in range(0, len(found), len(MODES)):
            flat, overlapped, sequential, fp8 = found[at : at + len(MODES)]
            assert flat[2] == 0 < overlapped[2] == sequential[2]
            # Other sums of the same float64 terms.
            assert overlapped[0] == pytest.approx(flat[0], rel=1e-9)
            for name, grad in overlapped[1].items():
                own, twin = torch.from_numpy(grad), torch.from_numpy(flat[1][name])
                assert float((own - twin).norm()) <= 1e-9 * float(twin.norm()), name
            # Turns change no bit.
            assert overlapped[0] == sequential[0]
            assert _bits(overlapped[1]) == _bits(sequential[1])
            # The paper's bound for training in FP8; here only tokens and gradients are.
            assert fp8[2] == overlapped[2]
            assert fp8[0] != flat[0]
            assert fp8[0] == pytest.approx(flat[0], rel=2.5e-3)


def _bits(grads) -> dict[str, str]:
    return {name: hashlib.sha256(grad.tobytes()).hexdigest() for name, grad in grads.items()}
