"""Router biases follow loads exactly; layers split and experts are placed without gaps."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_config

from dualray.errors import ConfigError
from dualray.model.router import Router, choose_experts
from dualray.parallel.balance import max_violation, update_biases
from dualray.parallel.held import split_layers
from dualray.parallel.layout import Coordinate, Layout, dense_ranks, expert_ranks
from dualray.schedule.actions import Kind, flatten
from dualray.schedule.forward_only import forward_only
from dualray.schedule.make import make_schedule


def test_bias_moves_against_the_load_and_a_tie_does_not_move() -> None:
    router = Router(tiny_config(n_routed_experts=4, n_group=1, topk_group=1), layer=1)
    loads = {1: torch.tensor([10, 30, 20, 20])}
    update_biases([router], loads, gamma=0.5)
    assert router.e_score_correction_bias.tolist() == [0.5, -0.5, 0.0, 0.0]
    update_biases([router], loads, gamma=0.0)
    assert router.e_score_correction_bias.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_large_loads_are_compared_exactly() -> None:
    # As floats these counts are equal; as integers one expert is overloaded by one token.
    router = Router(
        tiny_config(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1), layer=1
    )
    update_biases([router], {1: torch.tensor([2**55 + 1, 2**55])}, gamma=1.0)
    assert router.e_score_correction_bias.tolist() == [-1.0, 1.0]


def test_max_violation_is_the_excess_over_the_mean() -> None:
    assert max_violation(torch.tensor([1, 1, 4, 2])) == 1.0
    assert max_violation(torch.tensor([5, 5])) == 0.0
    assert max_violation(torch.tensor([0, 0])) == 0.0


def test_experts_come_from_the_best_groups_only() -> None:
    config = tiny_config(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    # The best single expert (0.9) sits in a group whose top two sum to less than the others'.
    biased = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.1, 0.7, 0.4]])
    assert sorted(choose_experts(biased, config)[0].tolist()) == [2, 3, 6]


@pytest.mark.parametrize("num_layers", range(1, 14))
def test_layers_split_without_gaps(num_layers: int) -> None:
    for stages in range(1, num_layers + 1):
        ranges = split_layers(num_layers, stages)
        assert [i for r in ranges for i in r] == list(range(num_layers))
        lengths = [len(r) for r in ranges]
        assert max(lengths) - min(lengths) <= 1
        assert lengths[-1] == min(lengths)


def test_more_stages_than_layers_is_one_sentence() -> None:
    with pytest.raises(
        ConfigError, match=r"num_hidden_layers 3 is fewer than the schedule's 4 stages"
    ):
        split_layers(3, 4)


def test_the_schedule_follows_the_pipeline_unless_it_is_named() -> None:
    assert Layout().schedule == "1f1b"
    assert Layout(pipeline=4).schedule == "dualpipe"
    assert Layout(pipeline=4, schedule="1f1b").schedule == "1f1b"


def test_mirrors_share_parameters() -> None:
    layout = Layout(pipeline=4, experts=2, replicas=2)
    schedule = make_schedule("dualpipe", 4, 8)
    for stage in range(4):
        ranks = dense_ranks(layout, schedule, stage)
        assert len(ranks) == 2 * 2 * 2
        coordinates = [layout.coordinate(rank) for rank in ranks]
        assert {c.pipeline for c in coordinates} == {stage, 3 - stage}
        for expert in range(2):
            assert set(expert_ranks(layout, schedule, stage, expert)) == {
                rank for rank, c in zip(ranks, coordinates) if c.expert == expert
            }
    for rank in range(layout.world_size):
        assert layout.rank(layout.coordinate(rank)) == rank
    assert layout.coordinate(15) == Coordinate(replica=1, pipeline=3, expert=1)


@pytest.mark.parametrize(("kind", "ranks"), [("dualpipe", 4), ("1f1b", 3), ("1f1b", 1)])
def test_forward_only_visits_every_stage_in_an_order_that_cannot_block(kind, ranks) -> None:
    schedule = forward_only(make_schedule(kind, ranks, 8), 5)
    done: set[tuple[int, int, int]] = set()
    queues = [list(flatten(steps)) for steps in schedule.steps]
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            while queue:
                action = queue[0]
                assert action.kind is Kind.FORWARD
                stage = schedule.stage_of[rank][action.direction]
                if stage and (action.direction, action.micro_batch, stage - 1) not in done:
                    break
                done.add((action.direction, action.micro_batch, stage))
                queue.pop(0)
                moved = True
        assert moved, "no rank can go on"
    assert len(done) == 5 * ranks
