"""`rebalance_experts`: the public vector, its slow twin over many shapes, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.eplb_twin import place_layer

from dualray.errors import ConfigError
from dualray.parallel.placement import policy, policy_note, rebalance_experts

# The test vector published with EPLB.
LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_public_vector_comes_out_exactly() -> None:
    physical_to_logical, logical_to_physical, replica_count = rebalance_experts(LOAD, 16, 4, 2, 8)
    assert physical_to_logical.tolist() == PLACED
    assert logical_to_physical.dtype == replica_count.dtype == physical_to_logical.dtype == np.int64
    assert replica_count.tolist() == [[row.count(expert) for expert in range(12)] for row in PLACED]
    # Expert 1's first copy is packed first, beside expert 11 (86), which is lighter than 0 (90).
    assert logical_to_physical[0, 1].tolist() == [15, 13]
    assert logical_to_physical[0, 0].tolist() == [12, -1]


@st.composite
def problems(draw) -> tuple[list[list[int]], int, int, int, int]:
    num_nodes = draw(st.integers(1, 3))
    devices_per_node = draw(st.integers(1, 4))
    num_groups = draw(st.sampled_from([1, 2, 3, 4, 6]))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_devices = num_nodes * devices_per_node
    least_slots = -(-num_experts // num_devices)
    num_replicas = num_devices * draw(st.integers(least_slots, least_slots + 4))
    # Small integers tie often; ties must go the same way in both.
    loads = st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)
    load = draw(st.lists(loads, min_size=1, max_size=3))
    return load, num_replicas, num_groups, num_nodes, num_devices


@settings(max_examples=300, deadline=None)
@given(problems())
def test_it_equals_its_twin_in_plain_loops(problem) -> None:
    load, num_replicas, num_groups, num_nodes, num_devices = problem
    placed, slots_of, count = rebalance_experts(*problem)
    assert placed.shape == (len(load), num_replicas)
    assert slots_of.shape == (*np.shape(load), count.max())
    for layer, load_E in enumerate(load):
        twin, twin_slots = place_layer(load_E, num_replicas, num_groups, num_nodes, num_devices)
        assert placed[layer].tolist() == twin
        for expert, slots in twin_slots.items():
            assert count[layer, expert] == len(slots) >= 1
            padded = slots + [-1] * (slots_of.shape[2] - len(slots))
            assert slots_of[layer, expert].tolist() == padded


def test_61_layers_of_256_experts_equal_the_twin() -> None:
    load = np.random.default_rng(0).zipf(1.4, (61, 256)).clip(max=10_000)
    placed, _, _ = rebalance_experts(load, 288, 8, 4, 32)
    for layer in (0, 30, 60):
        assert placed[layer].tolist() == place_layer(load[layer].tolist(), 288, 8, 4, 32)[0]


def test_groups_stay_on_one_node() -> None:
    load = np.random.default_rng(1).integers(0, 1000, (3, 24))
    placed, _, _ = rebalance_experts(load, 32, 6, 2, 4)
    for row in placed.reshape(3, 2, 16) // 4:
        assert not set(row[0].tolist()) & set(row[1].tolist())


def test_groups_that_nodes_do_not_divide_are_placed_globally_and_that_is_said() -> None:
    assert policy(4, 2) == "hierarchical"
    assert policy(3, 2) == "global"
    assert policy_note(4, 2) == ""
    assert policy_note(3, 2) == (
        "model.n_group 3 is not divisible by 2 nodes, so experts are placed without regard to "
        "nodes and a token may reach all of them"
    )
    split, alone = rebalance_experts(LOAD, 16, 3, 2, 8), rebalance_experts(LOAD, 16, 1, 1, 8)
    assert all((a == b).all() for a, b in zip(split, alone))


@pytest.mark.parametrize(
    ("load", "counts", "sentence"),
    [
        (
            [[1, 2, 3]],
            (2, 1, 1, 2),
            "2 slots cannot hold 3 experts: every expert needs one; give at least 3 slots.",
        ),
        (
            [[1, 2, 3]],
            (5, 1, 1, 2),
            "5 slots are not divisible by 2 devices; choose a number of redundant copies that "
            "makes them so.",
        ),
        (
            [[1, 2, 3, 4]],
            (6, 2, 2, 3),
            "3 devices are not divisible by 2 nodes; give every node the same number of devices.",
        ),
        (
            [[1, 2, 3]],
            (4, 2, 2, 2),
            "model.n_routed_experts 3 is not divisible by model.n_group 2; choose a number of "
            "groups that divides the experts.",
        ),
        (
            [[1, 2, 3]],
            (4, 1, 0, 2),
            "there are 1 groups, 0 nodes and 2 devices, and there must be at least 1 of each; "
            "count again.",
        ),
        (
            [[1, 2], [3, float("nan")]],
            (2, 1, 1, 2),
            "the load of layer 1, expert 1 is nan and must be a finite number of at least 0; give "
            "counts of tokens.",
        ),
        (
            [[1, -2]],
            (2, 1, 1, 2),
            "the load of layer 0, expert 1 is -2.0 and must be a finite number of at least 0; "
            "give counts of tokens.",
        ),
        (
            [[float("inf"), 1]],
            (2, 1, 1, 2),
            "the load of layer 0, expert 0 is inf and must be a finite number of at least 0; give "
            "counts of tokens.",
        ),
        (
            [1, 2],
            (2, 1, 1, 2),
            "the load's shape is (2,) and must be [layers, experts], both at least 1; give one "
            "row of loads per layer.",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(load, counts, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        rebalance_experts(load, *counts)
    assert str(error.value) == sentence
