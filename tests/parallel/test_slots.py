"""Which rank holds which expert: homes, copies, ranks of unequal size."""

from __future__ import annotations

import pytest
from support.models import tiny_config

from dualray.errors import ConfigError
from dualray.parallel.slots import ExpertPlacement, contiguous_placement


def test_without_redundant_slots_every_expert_has_one() -> None:
    config = tiny_config(n_routed_experts=12)
    placement = contiguous_placement(config, 3)
    assert tuple(placement.held) == (1, 2, 3, 4, 5)  # layer 0 is dense, 4 and 5 are MTP's
    for layer, held in placement.held.items():
        assert sorted(e for experts in held for e in experts) == list(range(12))
        assert placement.slots(layer) == [4, 4, 4]
        for expert, slots in enumerate(placement.slots_of(layer)):
            (slot,) = slots
            assert held[slot // 4][slot % 4] == expert


def test_redundant_slots_hold_copies_and_ranks_may_differ() -> None:
    placement = contiguous_placement(tiny_config(n_routed_experts=8), 3, [5, 3, 4])
    assert placement.slots(1) == [5, 3, 4]
    homes = [placement.homes(1, rank) for rank in range(3)]
    assert homes == [(0, 1, 2), (3, 4), (5, 6, 7)]
    assert [placement.copies(1, rank) for rank in range(3)] == [(3, 4), (5,), (4,)]
    assert placement.slots_of(1)[3] == [5, 3]  # the home is on the second rank
    assert placement.home_ranks(1) == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 2}


def test_first_copies_stay_in_the_router_groups_of_their_rank() -> None:
    config = tiny_config(n_routed_experts=16, n_group=2, topk_group=1)
    placement = contiguous_placement(config, 4, [6] * 4)
    for rank in range(4):
        assert placement.homes(1, rank) == tuple(range(4 * rank, 4 * rank + 4))
        group = rank // 2
        assert all(expert // 8 == group for expert in placement.held[1][rank])
    wide = contiguous_placement(config, 2, [10, 10])
    assert wide.copies(1, 0) == (8, 9)  # there is no other expert of its group


def test_an_expert_has_exactly_one_home() -> None:
    with pytest.raises(AssertionError):
        ExpertPlacement(held={0: ((0, 1), (1, 0))}, num_homes={0: (2, 1)})
    with pytest.raises(AssertionError):
        ExpertPlacement(held={0: ((0, 1), (1, 0))}, num_homes={0: (1, 0)})


def test_slots_that_do_not_fit_are_one_sentence() -> None:
    config = tiny_config(n_routed_experts=12)
    with pytest.raises(ConfigError, match=r"12 is not divisible by layout\.experts 5"):
        contiguous_placement(config, 5)
    with pytest.raises(ConfigError, match=r"experts\.slots is \[6, 5\] and must be 2 numbers"):
        contiguous_placement(config, 2, [6, 5])
    with pytest.raises(ConfigError, match="no rank can use more slots than there are experts"):
        contiguous_placement(config, 2, [13, 5])
