"""The balancer's decisions: what it foresees, what it refuses, and how even loads become."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from support.eplb_twin import device_times
from support.models import tiny_config

from dualray.errors import RunError
from dualray.parallel.balancer import SERVING_PASSES, TRAINING_PASSES, Balancer, Horizon
from dualray.parallel.expert_moves import MoveCost, moves_between
from dualray.parallel.slots import ExpertPlacement, contiguous_placement

CHEAP = MoveCost(weight_bytes=100, state_bytes=600, bytes_per_s=1e9)
HORIZON = Horizon(steps=100, passes=TRAINING_PASSES, cost=CHEAP)


def contiguous(num_experts: int, slots: list[int], num_layers: int = 1) -> ExpertPlacement:
    config = tiny_config(
        n_routed_experts=num_experts, num_experts_per_tok=1, n_group=1, topk_group=1
    )
    one = contiguous_placement(config, len(slots), slots)
    layer = config.moe_layers[0]
    return ExpertPlacement(
        held=dict.fromkeys(range(num_layers), one.held[layer]),
        num_homes=dict.fromkeys(range(num_layers), one.num_homes[layer]),
    )


def zipf_load(seed: int, num_experts: int = 64) -> np.ndarray:
    """Popular experts side by side, as a router that was skewed on purpose makes them."""
    ranks = np.arange(1, num_experts + 1) ** -0.8
    noise = np.random.default_rng(seed).uniform(0.7, 1.3, num_experts)
    return np.round(1e5 * ranks * noise / ranks.sum())


def imbalance(load, parts, speeds=None) -> float:
    """In plain loops: the slowest device's time over the mean."""
    times = device_times(list(load), [list(part) for part in parts], speeds)
    return max(times) / (sum(load) / sum(speeds or [1.0] * len(parts)))


@pytest.mark.parametrize("seed", range(6))
def test_skewed_loads_become_even_with_a_quarter_more_slots(seed) -> None:
    old = contiguous(64, [10] * 8, num_layers=2)
    loads = {0: zipf_load(seed), 1: zipf_load(seed + 100)}
    # Without copies, as contiguous placement without redundancy would have it.
    for load in loads.values():
        assert imbalance(load, contiguous(64, [8] * 8).held[0]) >= 1.8
    balancer = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    balancer.observe(loads)
    proposal = balancer.consider(old, HORIZON, rows_per_s=1e5)
    assert proposal.adopt
    for layer, load in loads.items():
        after = imbalance(load, proposal.placement.held[layer])
        assert after <= 1.1
        change = next(c for c in proposal.layers if c.layer == layer)
        assert change.imbalance_after == pytest.approx(after)
        assert change.imbalance_before == pytest.approx(imbalance(load, old.held[layer]))
    assert proposal.imbalance_after == max(c.imbalance_after for c in proposal.layers)
    # Once moved, nothing is left to gain.
    again = balancer.consider(proposal.placement, HORIZON, rows_per_s=1e5)
    assert again.placement == proposal.placement
    assert not again.adopt


@pytest.mark.parametrize("slots", [8, 10])
def test_groups_keep_to_their_nodes(slots) -> None:
    old = contiguous(64, [slots] * 8)
    load = np.random.default_rng(5).permutation(zipf_load(5))
    balancer = Balancer(slots=[slots] * 8, nodes=[0] * 4 + [1] * 4, num_groups=8)
    balancer.observe({0: load})
    proposal = balancer.consider(old, HORIZON, rows_per_s=1e5)
    assert proposal.adopt
    parts = proposal.placement.held[0]
    groups = [{expert // 8 for part in node for expert in part} for node in (parts[:4], parts[4:])]
    assert not groups[0] & groups[1]
    assert imbalance(load, parts) < imbalance(load, old.held[0])


def test_without_redundant_slots_experts_only_change_places() -> None:
    load = zipf_load(1)
    balancer = Balancer(slots=[8] * 8, nodes=[0] * 8, num_groups=1)
    balancer.observe({0: load})
    proposal = balancer.consider(contiguous(64, [8] * 8), HORIZON, rows_per_s=1e5)
    assert proposal.placement.num_homes[0] == (8,) * 8
    assert all(move.state and move.weights for move in proposal.moves)
    # The most popular expert alone is above the mean; nothing but a copy would help it.
    assert proposal.imbalance_after < 0.6 * proposal.imbalance_before


def test_seconds_and_bytes_are_the_ones_that_a_person_would_count() -> None:
    old = contiguous(4, [2, 2])
    balancer = Balancer(slots=[2, 2], nodes=[0, 0], num_groups=1)
    balancer.observe({0: [60, 40, 0, 0]})
    cost = MoveCost(weight_bytes=10, state_bytes=30, bytes_per_s=20.0)
    horizon = Horizon(steps=50, passes=TRAINING_PASSES, sharers=2, cost=cost)
    proposal = balancer.consider(old, horizon, rows_per_s=100.0)
    (change,) = proposal.layers
    # 100 rows on the slowest rank become 60; 3 passes, 2 workers, 100 rows a second.
    assert change.seconds_before == pytest.approx(1.5)
    assert change.seconds_after == pytest.approx(0.9)
    assert (change.imbalance_before, change.imbalance_after) == (2.0, 1.2)
    # Two experts change places, with weights and state; each rank sends and receives one.
    assert (proposal.num_bytes, len(proposal.moves)) == (80, 2)
    assert proposal.cost_s == pytest.approx(2.0)
    assert proposal.gain_s == pytest.approx(0.6)
    assert proposal.reason == "1 of 1 layers move for 2 s and save 30 s in 50 steps"
    serving = replace(horizon, passes=SERVING_PASSES)
    assert balancer.consider(old, serving, rows_per_s=100.0).gain_s == pytest.approx(0.2)


def test_a_gain_that_does_not_repay_the_moving_is_left() -> None:
    old = contiguous(4, [2, 2])
    balancer = Balancer(slots=[2, 2], nodes=[0, 0], num_groups=1)
    balancer.observe({0: [60, 40, 0, 0]})
    cost = MoveCost(weight_bytes=10, state_bytes=30, bytes_per_s=10.0)
    # A step gains 1.2 s, moving takes 4 s: four steps repay it, three do not.
    four = balancer.consider(old, Horizon(steps=4, passes=3, cost=cost), rows_per_s=100.0)
    three = balancer.consider(old, Horizon(steps=3, passes=3, cost=cost), rows_per_s=100.0)
    assert (four.adopt, three.adopt) == (True, False)
    assert three.placement is old
    assert (three.moves, three.moved_layers, three.gain_s) == ((), (), 0)
    assert three.reason == (
        "layer 0 would gain most, 1.2 s of 3 s a step, which over 3 steps is not worth moving for "
        "4 s"
    )
    slow = replace(cost, overhead_s=1.0)
    proposal = balancer.consider(old, Horizon(steps=4, passes=3, cost=slow), rows_per_s=100.0)
    assert not proposal.adopt
    assert proposal.reason == "1 of 1 layers would save 4.8 s in 4 steps and take 5 s to move"
    assert not any(change.moved for change in proposal.layers)


def test_gains_below_the_margin_are_left_however_cheap() -> None:
    old = contiguous(4, [2, 2])
    for min_gain, adopt in ((0.02, True), (0.05, False)):
        balancer = Balancer(slots=[2, 2], nodes=[0, 0], num_groups=1, min_gain=min_gain)
        balancer.observe({0: [54, 50, 46, 50]})  # 104 against 96; 100 each is within reach
        assert balancer.consider(old, HORIZON, rows_per_s=100.0).adopt is adopt


def test_only_layers_that_gain_are_moved() -> None:
    old = contiguous(64, [10] * 8, num_layers=3)
    balancer = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    # The first placement holds second copies of 16 experts; these loads suit it exactly.
    copies = np.bincount([e for part in old.held[0] for e in part])
    balancer.observe({0: 100 * copies, 1: zipf_load(0), 2: 100 * copies})
    proposal = balancer.consider(old, HORIZON, rows_per_s=1e5)
    assert proposal.moved_layers == (1,)
    assert {move.layer for move in proposal.moves} == {1}
    for layer in (0, 2):
        assert proposal.placement.held[layer] == old.held[layer]
        assert proposal.placement.num_homes[layer] == old.num_homes[layer]
    assert list(proposal.moves) == moves_between(old, proposal.placement, 1)


def test_small_changes_move_little() -> None:
    old = contiguous(64, [8] * 8)
    load = np.full(64, 100.0)
    load[[0, 1, 2]] = 200, 180, 160
    balancer = Balancer(slots=[8] * 8, nodes=[0] * 8, num_groups=1)
    balancer.observe({0: load})
    proposal = balancer.consider(old, HORIZON, rows_per_s=1e5)
    assert proposal.adopt
    # A new placement would move most of 64 experts; three exchanges spread the three.
    assert len(proposal.moves) <= 6


def test_homes_stay_on_ranks_that_still_hold_the_expert() -> None:
    old = contiguous(64, [10] * 8)
    balancer = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    balancer.observe({0: zipf_load(3)})
    new = balancer.consider(old, HORIZON, rows_per_s=1e5).placement
    homes = new.home_ranks(0)
    for expert, rank in old.home_ranks(0).items():
        assert homes[expert] == rank or expert not in new.held[0][rank]


@pytest.mark.parametrize("num_groups", [1, 16])
def test_a_measured_slow_node_gets_proportionally_less(num_groups) -> None:
    slots, nodes = [12] * 4 + [8] * 4, [0] * 4 + [1] * 4
    old = contiguous(64, slots)
    load = np.random.default_rng(1).permutation(zipf_load(1))
    balancer = Balancer(slots=slots, nodes=nodes, num_groups=num_groups)
    speeds = [1000.0] * 4 + [500.0] * 4
    balancer.observe({0: load}, speeds)
    proposal = balancer.consider(old, HORIZON, rows_per_s=1.0)
    parts = proposal.placement.held[0]
    loads = device_times(list(load), [list(part) for part in parts])
    assert sum(loads[4:]) / sum(loads) == pytest.approx(1 / 3, rel=0.1)
    assert imbalance(load, parts, speeds) <= 1.1
    assert proposal.imbalance_after == pytest.approx(imbalance(load, parts, speeds))
    assert proposal.layers[0].seconds_after == pytest.approx(
        3 * max(device_times(list(load), [list(part) for part in parts], speeds))
    )


def test_noise_in_measured_speeds_moves_nothing() -> None:
    old, load = contiguous(64, [10] * 8), zipf_load(2)
    plain = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    plain.observe({0: load}, [1000.0] * 8)
    noisy = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    noisy.observe({0: load}, [1000.0, 980.0, 1030.0, None, 1000.0, 960.0, 1010.0, 1020.0])
    one, other = (b.consider(old, HORIZON, rows_per_s=1.0) for b in (plain, noisy))
    assert one.placement == other.placement


def test_loads_that_cannot_be_change_nothing() -> None:
    old, load = contiguous(64, [10] * 8), zipf_load(4)
    balancer = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    balancer.observe({0: load}, [1000.0] * 8)
    before = balancer.consider(old, HORIZON, rows_per_s=1.0)
    broken = load.copy()
    broken[7] = np.nan
    with pytest.raises(RunError) as error:
        balancer.observe({0: broken}, [10.0] * 8)
    assert str(error.value) == (
        "the load of layer 0, expert 7 is nan and must be a finite number of at least 0; experts "
        "stay where they are; look for NaN in the router's scores."
    )
    with pytest.raises(RunError) as error:
        balancer.observe({0: load[::-1]}, [1000.0] * 7 + [0.0])
    assert str(error.value) == (
        "the speed of expert rank 7 is 0.0 rows/s and must be finite and above 0; experts stay "
        "where they are; give None for a rank that had no rows."
    )
    assert balancer.consider(old, HORIZON, rows_per_s=1.0) == before


def test_nothing_is_decided_without_loads() -> None:
    old = contiguous(64, [10] * 8)
    balancer = Balancer(slots=[10] * 8, nodes=[0] * 8, num_groups=1)
    proposal = balancer.consider(old, HORIZON, rows_per_s=1.0)
    assert (proposal.adopt, proposal.reason) == (False, "no load has been seen yet")
    balancer.observe({0: np.zeros(64)})
    proposal = balancer.consider(old, HORIZON, rows_per_s=1.0)
    assert not proposal.adopt
    assert proposal.reason == "no layer would be faster with its experts elsewhere"
    assert proposal.imbalance_before == proposal.imbalance_after == 1.0


def test_groups_that_nodes_do_not_divide_are_noted() -> None:
    balancer = Balancer(slots=[4] * 4, nodes=[0, 0, 1, 1], num_groups=3)
    proposal = balancer.consider(contiguous(12, [4] * 4), HORIZON, rows_per_s=1.0)
    assert proposal.note == (
        "model.n_group 3 is not divisible by 2 nodes, so experts are placed without regard to "
        "nodes and a token may reach all of them"
    )


def test_equal_observations_give_equal_proposals_and_both_can_travel() -> None:
    old = contiguous(64, [10] * 8, num_layers=2)
    proposals = []
    for _ in range(2):
        balancer = Balancer(slots=[10] * 8, nodes=[0] * 4 + [1] * 4, num_groups=8)
        for seed in range(3):
            balancer.observe({0: zipf_load(seed), 1: zipf_load(seed + 9)}, [5.0 + seed] * 8)
        proposals.append(balancer.consider(old, HORIZON, rows_per_s=1.0))
        travelled = pickle.loads(pickle.dumps(balancer))
        proposals.append(travelled.consider(old, HORIZON, rows_per_s=1.0))
    assert proposals[0] == proposals[1] == proposals[2] == proposals[3]
    assert pickle.loads(pickle.dumps(proposals[0])) == proposals[0]
