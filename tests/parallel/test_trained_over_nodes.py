"""Whole steps with expert ranks on two nodes, node by node and flat, and what crossed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.train_config import TrainConfig

MODEL = tiny_config(n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=3)
TRAIN = TrainConfig(
    steps=8, seq_len=12, micro_batches=2, lr=3e-3, optimizer="adamw", dtype="float64", gamma=0.01
)
LAYOUT = Layout(pipeline=1, experts=4, schedule="dualpipev")
NODES = NodeMap(node_of=(0, 0, 1, 1))
COPIED = contiguous_placement(MODEL, 4, [3] * 4)


def run(rank: int, cases: list[tuple[NodeMap | None, ExpertsConfig, bool, int]]) -> list[list]:
    found = []
    for nodes, experts, copied, port in cases:
        trainer = make_trainer(
            rank, MODEL, LAYOUT, TRAIN, port,
            nodes=nodes, experts=experts, placement=COPIED if copied else None,
        )  # fmt: skip
        steps = [trainer.step(step, tokens_for(MODEL, TRAIN)) for step in range(3)]
        found.append([(step.loss, step.cross_node_bytes) for step in steps])
        trainer.close()
    return found


@pytest.mark.multiproc
def test_a_run_over_nodes_is_the_flat_one_and_sends_less() -> None:
    plain, flat = ExpertsConfig(), ExpertsConfig(dispatch="flat")
    fp8 = replace(plain, fp8_dispatch=True)
    cases = [
        (None, plain, False), (NODES, flat, False), (NODES, plain, False), (NODES, plain, True),
        (NODES, fp8, False), (None, fp8, False),
    ]  # fmt: skip
    results = run_ranks(run, 4, [(*case, free_port()) for case in cases])
    alone, sent_flat, limited, copied, coded, coded_alone = (
        [found[case] for found in results] for case in range(len(cases))
    )
    losses = [[loss for loss, _ in case[0]] for case in (alone, sent_flat, limited, copied)]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-9)
    for eight_bits in (coded, coded_alone):
        found = [loss for loss, _ in eight_bits[0]]
        assert found == pytest.approx(losses[0], rel=5e-3)
        assert found != losses[0]
    crossed = [
        sum(count for found in case for _, count in found)
        for case in (alone, sent_flat, limited, coded)
    ]
    assert crossed[0] == 0
    assert crossed[1] > crossed[2] > crossed[3] > 0
