"""What travels from one placement to another, and which rank takes which part of a new one."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.errors import ConfigError
from dualray.parallel.expert_moves import MoveCost, moves_between
from dualray.parallel.settle import settle, with_homes
from dualray.parallel.slots import ExpertPlacement

COST = MoveCost(weight_bytes=2, state_bytes=12, bytes_per_s=100.0)


def placement(*ranks: tuple[tuple[int, ...], tuple[int, ...]]) -> ExpertPlacement:
    """Of layer 0, from each rank's homes and copies."""
    return ExpertPlacement(
        held={0: tuple(homes + copies for homes, copies in ranks)},
        num_homes={0: tuple(len(homes) for homes, _ in ranks)},
    )


@st.composite
def placements(draw, num_experts: int, num_ranks: int) -> ExpertPlacement:
    homes = [draw(st.integers(0, num_ranks - 1)) for _ in range(num_experts)]
    held, num_homes = [], []
    for rank in range(num_ranks):
        mine = [e for e in range(num_experts) if homes[e] == rank]
        others = [e for e in range(num_experts) if homes[e] != rank]
        copies = draw(st.lists(st.sampled_from(others), unique=True, max_size=2) if others else
                      st.just([]))  # fmt: skip
        held.append((*mine, *copies))
        num_homes.append(len(mine))
    return ExpertPlacement(held={0: tuple(held)}, num_homes={0: tuple(num_homes)})


@settings(max_examples=200, deadline=None)
@given(placements(5, 3), placements(5, 3))
def test_moves_carry_exactly_what_is_missing(old, new) -> None:
    weights = {(rank, e) for rank in range(3) for e in old.held[0][rank]}
    states = {(rank, e) for e, rank in old.home_ranks(0).items()}
    homes, arrived, handed_over = set(states), set(), set()
    for move in moves_between(old, new, 0):
        assert move.source != move.target
        assert (move.source, move.expert) in homes
        if move.weights:
            assert (move.target, move.expert) not in weights | arrived
            arrived.add((move.target, move.expert))
        if move.state:
            assert (move.source, move.expert) in states
            states.remove((move.source, move.expert))
            handed_over.add((move.target, move.expert))
    assert weights | arrived >= {(rank, e) for rank in range(3) for e in new.held[0][rank]}
    assert states | handed_over == {(rank, e) for e, rank in new.home_ranks(0).items()}


def test_nothing_moves_to_where_it_is() -> None:
    one = placement(((0, 1), (2,)), ((2, 3), (0,)))
    assert moves_between(one, one, 0) == []


def test_a_home_that_moves_to_its_copy_takes_no_weights_along() -> None:
    old = placement(((0, 1), ()), ((2, 3), (0,)))
    new = placement(((1,), (0,)), ((0, 2, 3), ()))
    (move,) = moves_between(old, new, 0)
    assert (move.expert, move.source, move.target, move.weights, move.state) == (
        0,
        0,
        1,
        False,
        True,
    )
    assert COST.size([move]) == 12


def test_weights_come_from_the_old_home() -> None:
    old = placement(((0,), ()), ((1,), ()), ((2,), (0,)), ((3,), ()))
    new = placement(((0,), ()), ((1,), (0,)), ((2,), (0,)), ((3,), (0,)))
    moves = moves_between(old, new, 0)
    assert [(move.source, move.target) for move in moves] == [(0, 1), (0, 3)]
    assert COST.size(moves) == 4
    assert COST.seconds(moves) == 4 / 100


def test_sharers_move_a_part_of_the_state_each_and_all_of_the_weights() -> None:
    old, new = placement(((0, 1), ()), ((2,), ())), placement(((1,), ()), ((2, 0), ()))
    (move,) = moves_between(old, new, 0)
    shared = replace(COST, sharers=4)
    assert shared.seconds([move]) == (2 + 12 / 4) / 100
    assert shared.size([move]) == COST.size([move]) == 14


def test_the_busiest_rank_says_how_long_moving_takes() -> None:
    old = placement(((0, 1), ()), ((2,), ()), ((3,), ()))
    new = placement(((0, 1), ()), ((2,), (0, 1)), ((3,), (0,)))
    moves = moves_between(old, new, 0)
    # Rank 0 sends three times 2 bytes; rank 1 receives two of them.
    assert COST.seconds(moves) == 6 / 100
    assert COST.seconds([]) == 0.0


def cost_of(contents, old) -> int:
    held, num_homes = with_homes(contents, old.home_ranks(0))
    new = ExpertPlacement(held={0: held}, num_homes={0: num_homes})
    return COST.size(moves_between(old, new, 0))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000))
def test_parts_go_to_where_most_of_them_is(seed) -> None:
    random = np.random.default_rng(seed)
    experts = random.permutation(12)
    held, num_homes = with_homes(experts.reshape(4, 3).tolist(), {})
    old = ExpertPlacement(held={0: held}, num_homes={0: num_homes})
    for _ in range(random.integers(0, 5)):
        one, other = random.integers(0, 12, 2)
        experts[[one, other]] = experts[[other, one]]
    parts = experts.reshape(4, 3)[random.permutation(4)].tolist()
    placed = settle(parts, old, 0, kinds=[1] * 4, nodes=[0] * 4, cost=COST)
    assert sorted(placed) == sorted(map(tuple, parts))
    assert cost_of(placed, old) == min(cost_of(order, old) for order in permutations(parts))


def test_a_placement_that_only_names_ranks_differently_moves_nothing() -> None:
    old = placement(((0, 1), ()), ((2, 3), ()), ((4, 5), ()), ((6, 7), ()))
    # Nodes changed places, and the devices of one of them.
    parts = [(6, 7), (4, 5), (0, 1), (2, 3)]
    placed = settle(parts, old, 0, kinds=[1] * 4, nodes=[0, 0, 1, 1], cost=COST)
    assert placed == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_unequal_ranks_keep_their_parts() -> None:
    old = placement(((0, 1), ()), ((2, 3), ()), ((4, 5), ()))
    parts = [(2, 3), (4, 5), (0, 1)]
    placed = settle(parts, old, 0, kinds=["slow", "fast", "fast"], nodes=[0] * 3, cost=COST)
    assert placed == [(2, 3), (0, 1), (4, 5)]
    placed = settle(parts, old, 0, kinds=["fast", "slow", "fast"], nodes=[0] * 3, cost=COST)
    assert placed == [(0, 1), (4, 5), (2, 3)]


def test_nodes_change_places_only_with_equal_devices() -> None:
    old = placement(((0, 1), ()), ((2, 3), ()))
    parts = [(2, 3), (0, 1)]
    for kinds, expected in ([1, 1], [(0, 1), (2, 3)]), ([1, 2], parts):
        assert settle(parts, old, 0, kinds=kinds, nodes=[0, 1], cost=COST) == expected


def test_homes_stay_and_new_ones_are_spread() -> None:
    held, num_homes = with_homes([(3, 0, 1), (1, 2, 0), (3, 2)], {0: 1, 1: 1, 2: 0, 3: 2})
    # 0, 1 and 3 stay; 2's rank no longer holds it, and rank 2 has fewer homes than rank 1.
    assert held == ((0, 1, 3), (0, 1, 2), (2, 3))
    assert num_homes == (0, 2, 2)
    held, num_homes = with_homes([(0, 1, 2), (0, 1, 3)], {})
    assert (held, num_homes) == (((0, 2, 1), (1, 3, 0)), (2, 2))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"weight_bytes": 1, "state_bytes": -1, "bytes_per_s": 1.0},
            "moving an expert costs 1 and -1 bytes and 0.0 s, and none of them may be negative; "
            "give 0 for what does not travel.",
        ),
        (
            {"weight_bytes": 1, "state_bytes": 1, "bytes_per_s": 0.0},
            "experts move at 0.0 bytes a second, which must be above 0; measure it, or leave it "
            "at its default.",
        ),
    ],
)
def test_impossible_costs_are_refused(fields, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        MoveCost(**fields)
    assert str(error.value) == sentence
