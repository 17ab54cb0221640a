"""A router that prefers few experts, and the balancer that spreads them over the workers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import tiny_config
from support.processes import free_port, run_ranks
from support.training import make_trainer, tokens_for

from dualray.errors import RunError
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.rebalancing import Rebalancing, loads_of, rank_imbalance, times_of
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.train_config import TrainConfig
from dualray.schedule.make import make_schedule

MODEL = tiny_config(n_routed_experts=16, num_experts_per_tok=2, n_group=1, topk_group=1)
TRAIN = TrainConfig(
    steps=20, seq_len=12, micro_batches=4, micro_batch_size=64, lr=1e-6, min_lr=1e-6,
    optimizer="adamw", dtype="float64", balance="none",
)  # fmt: skip
LAYOUT = Layout(pipeline=1, experts=4, schedule="1f1b")
OVERHEAD = 20_000
"""Rows: an expert rank has 6144 a layer and step on average."""
EXPERTS = ExpertsConfig(redundant=4, rebalance_every=3, link_bytes_per_s=1e15, min_gain=0.0)


def _rebalancing(**changes) -> Rebalancing:
    config = replace(EXPERTS, **changes)
    return Rebalancing(
        config,
        MODEL,
        LAYOUT,
        make_schedule("1f1b", 1, 4),
        config.first_placement(MODEL, LAYOUT),
        nodes=None,
        dtype=torch.float64,
        trains=True,
        has_state=True,
    )


def skewed_run(rank: int, port: int, moves: bool) -> list:
    placement = EXPERTS.first_placement(MODEL, LAYOUT)
    trainer = make_trainer(rank, MODEL, LAYOUT, TRAIN, port, placement=placement)
    for router in trainer.held.routers():
        # The first experts, which are neighbours, are chosen more than their share.
        router.e_score_correction_bias.copy_(torch.linspace(0.2, -0.2, 16))
    rebalancing = _rebalancing()
    told = torch.distributed.group.WORLD
    found = []
    for step in range(9):
        result = trainer.step(step, tokens_for(MODEL, TRAIN))
        work = result.work
        works: list = [None] * LAYOUT.world_size
        torch.distributed.all_gather_object(works, work, group=told)
        assert {k: v.tolist() for k, v in loads_of(trainer.placement, LAYOUT, works).items()} == (
            result.loads
        )
        found.append((result.loss, rank_imbalance(LAYOUT, works)))
        # Times differ from run to run; every process must decide alike, as the controller does. As
        # long as these take, the overloaded rank would look twice as fast without its overhead.
        works = [
            replace(each, seconds={k: (sum(v) + OVERHEAD) / 1e6 for k, v in each.slot_rows.items()})
            for each in works
        ]
        proposal = rebalancing.saw(works, step=step + 1)
        if moves and proposal is not None and proposal.adopt:
            moved: list = [None] * LAYOUT.world_size
            own = trainer.move_experts(proposal.placement)
            torch.distributed.all_gather_object(moved, own, group=told)
            rebalancing.moved(proposal.placement, moved)
    trainer.close()
    return found


@pytest.mark.multiproc
def test_a_skewed_router_is_spread_over_the_workers() -> None:
    still = run_ranks(skewed_run, 4, free_port(), False)[0]
    moved = run_ranks(skewed_run, 4, free_port(), True)[0]
    before = [max(imbalances.values()) for _, imbalances in still]
    after = [max(imbalances.values()) for _, imbalances in moved]
    assert before[:3] == after[:3]
    assert min(before) >= 1.8
    assert max(after[3:]) <= 1.1
    for (loss, _), (wanted, _) in zip(moved, still, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-9)


def _skewed_works() -> list[ExpertWork]:
    works = [ExpertWork(slot_rows={1: [900, 700, 30, 20, 10]}, seconds={1: 0.1})]
    return works + [ExpertWork(slot_rows={1: [10] * 5}, seconds={1: 0.1})] * 3


def test_what_moving_took_is_foreseen() -> None:
    rebalancing = _rebalancing(rebalance_every=2, link_bytes_per_s=1.0)
    placement, works = rebalancing.placement, _skewed_works()
    assert rebalancing.saw(works, step=1) is None
    proposal = rebalancing.saw(works, step=2)
    assert proposal is not None
    # At a byte a second nothing is worth moving.
    assert not proposal.adopt
    assert "not worth moving" in proposal.reason
    rebalancing.moved(placement, [Moved(layers=(1,), received_bytes=10**12, seconds=0.1)])
    proposal = rebalancing.saw(works, step=4, steps=2)
    assert proposal.adopt
    # A migration that took long and moved little: so will the next one, whatever it moves.
    rebalancing = _rebalancing(rebalance_every=2)
    rebalancing.moved(placement, [Moved(layers=(1,), received_bytes=0, seconds=20.0)])
    rebalancing.saw(works, step=1)
    proposal = rebalancing.saw(works, step=2)
    assert not proposal.adopt
    assert "and take 20 s to move" in proposal.reason


@pytest.mark.parametrize(
    ("first", "looks"),
    [
        (1, [4, 8]),
        (7, [8]),
        (8, [9, 12]),  # nothing is decided from one step
        (10, [12, 16]),  # a resumed run looks when the first one would have
    ],
)
def test_looks_come_at_multiples_of_the_runs_steps(first, looks) -> None:
    rebalancing = _rebalancing(rebalance_every=4)
    steps = range(first, looks[-1] + 1)
    seen = [step for step in steps if rebalancing.saw(_skewed_works(), step=step) is not None]
    assert seen == looks


def test_a_multiple_that_nobody_saw_is_made_up_for() -> None:
    rebalancing = _rebalancing(rebalance_every=4)
    steps = [1, 2, 3, 5, 6, 7, 9]
    seen = [step for step in steps if rebalancing.saw(_skewed_works(), step=step) is not None]
    assert seen == [5, 9]


def test_what_is_gained_is_gained_until_the_run_ends() -> None:
    for left, adopt in ((None, True), (10, True), (1, False), (0, False)):
        # Moving takes 35 ms and saves 28 ms a step.
        rebalancing = _rebalancing(rebalance_every=4, link_bytes_per_s=1e6)
        rebalancing.saw(_skewed_works(), step=3, left=left)
        assert rebalancing.saw(_skewed_works(), step=4, left=left).adopt is adopt


def test_state_is_divided_over_the_copies_of_an_expert() -> None:
    layout = Layout(pipeline=2, experts=4, replicas=3, schedule="dualpipe")
    rebalancing = Rebalancing(
        EXPERTS, MODEL, layout, make_schedule("dualpipe", 2, 4),
        EXPERTS.first_placement(MODEL, layout),
        nodes=None, dtype=torch.float64, trains=True, has_state=True,
    )  # fmt: skip
    alone, cost = _rebalancing()._cost(), rebalancing._cost()
    assert (alone.sharers, cost.sharers) == (1, 2 * 3)
    assert cost.state_bytes == alone.state_bytes


def test_what_workers_did_is_told_by_expert_and_by_rank() -> None:
    layout = Layout(pipeline=1, experts=2, replicas=2, schedule="1f1b")
    placement = contiguous_placement(replace(MODEL, n_routed_experts=4), 2, [3, 3])
    works = [
        ExpertWork(slot_rows={1: [5, 6, 7]}, seconds={1: 2.0}),  # experts 0, 1 and a copy of 2
        ExpertWork(slot_rows={1: [1, 2, 3]}, seconds={1: 3.0}),  # experts 2, 3 and a copy of 0
        ExpertWork(slot_rows={1: [1, 1, 0]}, seconds={1: 0.0}),
        ExpertWork(slot_rows={1: [0, 0, 0]}, seconds={1: 1.0}),
    ]
    assert loads_of(placement, layout, works)[1].tolist() == [5 + 1 + 3, 6 + 1, 7 + 1, 2]
    times = times_of(layout, [1], works)
    # The mean of what was timed: rank 2 was not, and rank 3 had no rows.
    assert (times.rows_LR.tolist(), times.seconds_LR.tolist()) == ([[18, 6]], [[2, 3]])
    windows = times_of(layout, [0, 1], works, steps=2)
    assert windows.rows_LR.tolist() == [[0, 0], [9, 3]]
    assert rank_imbalance(layout, works) == {1: 20 * 2 / 26}
    nobody = [ExpertWork(slot_rows={1: [0, 0, 0]}, seconds={1: 0.0})] * 4
    assert not times_of(layout, [1], nobody).rows_LR.any()
    assert rank_imbalance(layout, nobody) == {}


def test_impossible_loads_are_refused_and_nothing_is_taken_in() -> None:
    rebalancing = _rebalancing(rebalance_every=1)
    works = [ExpertWork(slot_rows={1: [5, 5, 5, 5, 5]}, seconds={1: 1.0})] * 4
    broken = [replace(works[0], slot_rows={1: [-50, 5, 5, 5, 5]}), *works[1:]]
    with pytest.raises(RunError, match="layer 1"):
        rebalancing.saw(broken, step=1)
    for seconds in (-1.0, float("nan"), float("inf")):
        stopped = [replace(works[0], seconds={1: seconds}), *works[1:]]
        with pytest.raises(RunError, match=f"rank 0 was measured to compute for {seconds} s"):
            rebalancing.saw(stopped, step=1)
    assert rebalancing.saw(works, step=1) == _rebalancing(rebalance_every=1).saw(works, step=1)


def test_nodes_come_from_the_workers_hosts_or_from_the_run_file() -> None:
    layout = Layout(pipeline=2, experts=4, schedule="dualpipe")
    config = ExpertsConfig()
    assert config.nodes_of(layout, ["a"] * 8) == (None, "")
    assert config.nodes_of(layout, list("aabbccdd")) == (NodeMap(node_of=(0, 0, 1, 1)), "")
    nodes, word = config.nodes_of(layout, list("aabbcddd"))
    assert nodes is None
    assert "lie differently" in word
    asked, word = replace(config, dispatch="node_limited").nodes_of(layout, ["a"] * 8)
    assert asked is None
    assert "on one node" in word
    by_hand = replace(config, ranks_per_node=1)
    assert by_hand.nodes_of(layout, ["a"] * 8)[0] == NodeMap(node_of=(0, 1, 2, 3))


def test_a_checkpoints_placement_is_taken_if_it_fits() -> None:
    from dualray.parallel.slots import to_plain

    other = _rebalancing().placement
    plain = to_plain(other)
    assert EXPERTS.placement_after(plain, MODEL, LAYOUT) == (other, "")
    fewer = replace(EXPERTS, redundant=0)
    first, word = fewer.placement_after(plain, MODEL, LAYOUT)
    assert first == contiguous_placement(MODEL, 4)
    assert "is forgotten" in word
    assert fewer.placement_after(None, MODEL, LAYOUT) == (first, "")
    assert np.all(np.array(fewer.first_placement(MODEL, LAYOUT).slots(1)) == 4)
