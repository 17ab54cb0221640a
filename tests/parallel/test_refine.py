"""The local search: its arithmetic against plain loops, and that it only ever improves."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.eplb_twin import device_times

from dualray.parallel.refine import FREE, Arrangement

SPEEDS = [1.0, 0.5, 1.0, 0.8]


def arrangement(seed: int, *, num_experts: int = 8, slots: int = 4, nodes=(0, 0, 0, 0)):
    """Random, complete, without an expert twice on a device; each node has its own experts."""
    random = np.random.default_rng(seed)
    num_nodes = max(nodes) + 1
    load_E = random.integers(1, 100, num_experts).astype(float)
    expert_S = np.full(4 * slots, FREE)
    device_S = np.repeat(np.arange(4), slots)
    for expert in random.permutation(num_experts):
        mine = np.array(nodes)[device_S] == expert % num_nodes
        expert_S[random.choice(np.flatnonzero(mine & (expert_S == FREE)))] = expert
    for slot in np.flatnonzero(expert_S == FREE):
        node = nodes[device_S[slot]]
        there = set(expert_S[device_S == device_S[slot]].tolist())
        options = [e for e in range(num_experts) if e % num_nodes == node and e not in there]
        expert_S[slot] = random.choice(options)
    return Arrangement(expert_S, load_E, device_S, np.array(SPEEDS), np.array(nodes))


def parts_of(one: Arrangement) -> list[list[int]]:
    return [one.expert_S[one.device_S == device].tolist() for device in range(4)]


def times_of(one: Arrangement, parts: list[list[int]]) -> list[float]:
    return device_times(one.load_E.tolist(), parts, SPEEDS)


def all_swaps(one: Arrangement, device: int):
    """Times after every swap of a slot of `device` that puts no expert on a device twice."""
    parts = parts_of(one)
    for other in range(4):
        if other == device or one.node_D[other] != one.node_D[device]:
            continue
        for mine in parts[device]:
            for theirs in parts[other]:
                if theirs in parts[device] or mine in parts[other]:
                    continue
                after = [list(part) for part in parts]
                after[device][after[device].index(mine)] = theirs
                after[other][after[other].index(theirs)] = mine
                yield times_of(one, after), (device, other)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0, 0, 0, 0), (0, 1, 0, 1)]))
def test_the_best_swap_is_the_best_of_all(seed, nodes) -> None:
    one = arrangement(seed, nodes=nodes)
    np.testing.assert_allclose(one.times, times_of(one, parts_of(one)), rtol=1e-12)
    device = int(one.times.argmax())
    change, whole, pair = one._best_swap(np.flatnonzero(one.device_S == device))
    options = [(max(times[d] for d in two), max(times)) for times, two in all_swaps(one, device)]
    if not options:
        assert pair == np.inf
        return
    # Sums in another order: the last digits differ.
    np.testing.assert_allclose(pair, min(options)[0], rtol=1e-12)
    one._apply(change)
    np.testing.assert_allclose(max(times_of(one, parts_of(one))), whole, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0, 0, 0, 0), (0, 1, 0, 1)]))
def test_the_best_change_of_a_copy_takes_the_time_it_says(seed, nodes) -> None:
    one = arrangement(seed, nodes=nodes)
    slots, experts = one._candidates(int(one.times.argmax()))
    outcomes = []
    for slot, expert in zip(slots.tolist(), experts.tolist()):
        parts = parts_of(one)
        device = int(one.device_S[slot])
        assert expert not in parts[device]
        assert one.copies_E[one.expert_S[slot]] > 1
        parts[device][parts[device].index(one.expert_S[slot])] = expert
        outcomes.append(max(times_of(one, parts)))
    change, time = one._best_copy(slots, experts)
    if not outcomes:
        assert time == np.inf
        return
    np.testing.assert_allclose(time, min(outcomes), rtol=1e-12)
    one._apply(change)
    np.testing.assert_allclose(max(times_of(one, parts_of(one))), time, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(0, 0, 0, 0), (0, 1, 0, 1)]))
def test_improving_never_makes_it_slower_and_keeps_the_rules(seed, nodes) -> None:
    one = arrangement(seed, nodes=nodes)
    before = one.times.max()
    one.improve(good_enough=0.0, max_changes=50)
    assert one.times.max() <= before
    parts = parts_of(one)
    assert all(len(set(part)) == len(part) == 4 for part in parts)
    assert {expert for part in parts for expert in part} == set(range(8))
    for part, node in zip(parts, nodes):
        assert all(expert % (max(nodes) + 1) == node for expert in part)
    device = int(one.times.argmax())
    pairs = [max(times[d] for d in two) for times, two in all_swaps(one, device)]
    # It ended because no swap helps the slowest device any more.
    assert min(pairs, default=np.inf) >= one.times.max() * (1 - 1e-6)


def test_a_good_enough_arrangement_is_left_alone() -> None:
    one = arrangement(0)
    before = one.expert_S.copy()
    one.improve(good_enough=10.0, max_changes=50)
    assert (one.expert_S == before).all()
    one.improve(good_enough=0.0, max_changes=1)
    assert 0 < (one.expert_S != before).sum() <= 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_free_slots_get_copies_of_the_heaviest(seed) -> None:
    random = np.random.default_rng(seed)
    load_E = random.integers(1, 100, 8).astype(float)
    expert_S = np.array([0, 1, FREE, 2, 3, FREE, 4, 5, FREE, 6, 7, FREE])
    device_S = np.repeat(np.arange(4), 3)
    one = Arrangement(expert_S, load_E, device_S, np.array(SPEEDS), np.zeros(4, dtype=np.int64))
    one.fill()
    parts = parts_of(one)
    assert all(len(set(part)) == 3 for part in parts)
    assert (one.expert_S[expert_S != FREE] == expert_S[expert_S != FREE]).all()
    heaviest = int(load_E.argmax())
    assert one.copies_E[heaviest] > 1
    np.testing.assert_allclose(one.times, times_of(one, parts), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_doubled_experts_are_parted(seed) -> None:
    random = np.random.default_rng(seed)
    load_E = random.integers(0, 100, 6).astype(float)
    while True:
        expert_S = random.integers(0, 6, 12)
        if set(expert_S.tolist()) == set(range(6)):
            break
    device_S = np.repeat(np.arange(4), 3)
    one = Arrangement(expert_S, load_E, device_S, np.array(SPEEDS), np.zeros(4, dtype=np.int64))
    one.separate()
    parts = parts_of(one)
    assert all(len(set(part)) == 3 for part in parts)
    assert {expert for part in parts for expert in part} == set(range(6))
