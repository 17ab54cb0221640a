"""`place_experts`: unequal devices, whole groups on nodes, and how near it comes to the optimum."""

from __future__ import annotations

from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.eplb_twin import device_times

from dualray.errors import ConfigError
from dualray.parallel.packing import place_experts
from dualray.parallel.placement import rebalance_experts


def parts_of(placed_S, slots: list[int]) -> list[list[int]]:
    return [part.tolist() for part in np.split(placed_S, np.cumsum(slots)[:-1])]


def slowest(load, parts, speeds=None) -> float:
    return max(device_times(list(load), parts, speeds))


@st.composite
def problems(draw):
    num_nodes = draw(st.integers(1, 3))
    num_groups = num_nodes * draw(st.integers(1, 3))
    num_experts = num_groups * draw(st.integers(1, 4))
    nodes = [n for n in range(num_nodes) for _ in range(draw(st.integers(1, 3)))]
    nodes = draw(st.permutations(nodes))
    one = st.integers(1, num_experts)
    slots = draw(st.lists(one, min_size=len(nodes), max_size=len(nodes)))
    one = st.sampled_from([1.0, 1.0, 0.5, 0.7])
    speeds = draw(st.lists(one, min_size=len(nodes), max_size=len(nodes)))
    one = st.lists(st.integers(0, 50), min_size=num_experts, max_size=num_experts)
    return draw(st.lists(one, min_size=1, max_size=2)), slots, speeds, nodes, num_groups


@settings(max_examples=150, deadline=None)
@given(problems().filter(lambda p: sum(p[1]) >= len(p[0][0])))
def test_every_expert_is_held_and_no_device_holds_one_twice(problem) -> None:
    load, slots, _, _, _ = problem
    placed = place_experts(*problem)
    assert placed.shape == (len(load), sum(slots))
    assert (placed == place_experts(*problem)).all()
    for row in placed:
        parts = parts_of(row, slots)
        assert set(chain(*parts)) == set(range(len(load[0])))
        assert all(len(set(part)) == len(part) for part in parts)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([(1, 4), (2, 2), (2, 4)]), st.sampled_from([4, 5, 6])
)
def test_equal_devices_are_balanced_no_worse_than_by_eplb(seed, shape, slots) -> None:
    num_nodes, num_devices = shape[0], shape[0] * shape[1]
    load = np.random.default_rng(seed).zipf(1.5, (2, 16)).clip(max=100)
    if slots * num_devices < 16:
        return
    nodes = [device % num_nodes for device in range(num_devices)]  # nodes alternate
    ours = place_experts(load, [slots] * num_devices, [2.0] * num_devices, nodes, 4)
    theirs = rebalance_experts(load, slots * num_devices, 4, num_nodes, num_devices)[0]
    for load_E, our_row, their_row in zip(load, ours, theirs):
        parts = parts_of(their_row, [slots] * num_devices)
        if any(len(set(part)) < len(part) for part in parts):
            continue  # copies that share a device are no use to anybody, and not comparable
        best = slowest(load_E, parts_of(our_row, [slots] * num_devices))
        assert best <= slowest(load_E, parts) * (1 + 1e-9)  # sums in another order


def test_what_eplb_balances_well_is_taken_as_it_is() -> None:
    load = np.full((1, 16), 7)
    placed = place_experts(load, [4] * 4, [1.0] * 4, [0, 0, 1, 1], 4)
    assert (placed == rebalance_experts(load, 16, 4, 2, 4)[0]).all()


def test_tiny_problems_come_near_the_optimum() -> None:
    random = np.random.default_rng(0)
    ratios = []
    while len(ratios) < 60:
        num_experts = int(random.integers(4, 7))
        slots = random.integers(1, 4, 3).tolist()
        if sum(slots) < num_experts:
            continue
        speeds = random.choice([1.0, 1.0, 0.5, 0.7], 3).tolist()
        load = np.round(random.gamma(1.0, 100.0, num_experts))
        options = product(*(combinations(range(num_experts), count) for count in slots))
        whole = (parts for parts in options if len({*chain(*parts)}) == num_experts)
        optimum = min(slowest(load, parts, speeds) for parts in whole)
        placed = place_experts(load[None], slots, speeds, [0, 0, 0], 1)[0]
        ratios.append(slowest(load, parts_of(placed, slots), speeds) / optimum)
    # Measured: 1.022 on average and 1.19 at worst; the greedy start alone is at 1.13 and 1.43.
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / len(ratios) < 1.03
    assert max(ratios) < 1.25


def test_a_slow_node_gets_proportionally_less() -> None:
    load = np.random.default_rng(2).gamma(2.0, 50.0, (4, 64))
    speeds = [1.0] * 4 + [0.5] * 4
    for num_groups, slots in ((1, [10] * 8), (16, [12] * 4 + [8] * 4)):
        placed = place_experts(load, slots, speeds, [0] * 4 + [1] * 4, num_groups)
        for load_E, row in zip(load, placed):
            loads = device_times(list(load_E), parts_of(row, slots))
            # Half the speed: a third of all rows, not half of them.
            assert sum(loads[4:]) / load_E.sum() == pytest.approx(1 / 3, rel=0.05)
            times = device_times(list(load_E), parts_of(row, slots), speeds)
            assert max(times) <= 1.05 * load_E.sum() / sum(speeds)


def test_groups_stay_on_nodes_of_unequal_size() -> None:
    load = np.random.default_rng(3).integers(0, 100, (5, 32))
    slots, nodes = [9, 9, 9, 5, 5], [0, 0, 0, 1, 1]
    placed = place_experts(load, slots, [1.0] * 5, nodes, 8)
    for row in placed // 4:
        parts = parts_of(row, slots)
        assert not {*chain(*parts[:3])} & {*chain(*parts[3:])}


def test_groups_that_fit_no_node_are_placed_globally() -> None:
    load = np.ones((1, 8))
    # Two groups of 4; the second node has 3 slots.
    placed = place_experts(load, [3, 3, 3], [1.0] * 3, [0, 0, 1], 2)
    assert {*placed[0].tolist()} == set(range(8))


def test_copies_go_to_the_heaviest_expert_but_not_twice_to_a_device() -> None:
    placed = place_experts([[100, 1, 1, 1]], [4, 2, 2], [1.0] * 3, [0] * 3, 1)
    parts = parts_of(placed[0], [4, 2, 2])
    assert all(0 in part for part in parts)


@pytest.mark.parametrize(
    ("slots", "speeds", "sentence"),
    [
        (
            [2, 1],
            [1.0, 1.0],
            "slots are [2, 1]; a device must have 1 to 4, the number of experts, and all together "
            "at least 4; change the number of slots.",
        ),
        (
            [5, 1],
            [1.0, 1.0],
            "slots are [5, 1]; a device must have 1 to 4, the number of experts, and all together "
            "at least 4; change the number of slots.",
        ),
        (
            [2, 2],
            [1.0, 0.0],
            "the speed of device 1 is 0.0 and must be finite and above 0; leave out speeds that "
            "were not measured.",
        ),
        (
            [2, 2],
            [1.0],
            "slots are given for 2 devices, speeds for 1 and nodes for 2, and they must be as "
            "many, at least 1; give each device its slots, speed and node.",
        ),
    ],
)
def test_impossible_devices_are_refused(slots, speeds, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        place_experts([[1, 2, 3, 4]], slots, speeds, [0] * len(slots), 1)
    assert str(error.value) == sentence
