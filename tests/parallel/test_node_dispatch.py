"""Tokens over nodes: bit for bit what the flat dispatch delivers, and what a sum by node gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.dispatches import LAYERS, Case, expected, there_and_back
from support.models import tiny_config
from support.processes import free_port, run_ranks

from dualray.parallel import dispatch as flat_module
from dualray.parallel import node_dispatch as node_module
from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.make_dispatch import make_dispatch
from dualray.parallel.node_dispatch import NodeLimitedDispatch
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import contiguous_placement

CPU = torch.device("cpu")
TOKENS = (7, 0, 5, 13)
SLOTS = (3, 2, 4, 3)
BF16, FP64 = torch.bfloat16, torch.float64
CASES = {
    "two nodes": Case(node_of=(0, 0, 1, 1), tokens=TOKENS),
    "unequal nodes and slots": Case(node_of=(0, 0, 0, 1), tokens=TOKENS, slots=SLOTS),
    "ranks of a node apart": Case(node_of=(0, 1, 0, 1), tokens=TOKENS, slots=SLOTS, dtype=BF16),
    "a rank a node": Case(node_of=(0, 1, 2, 3), tokens=TOKENS, dtype=FP64),
    "nodes out of order": Case(node_of=(1, 0, 0, 2), tokens=TOKENS, slots=SLOTS, dtype=FP64),
    "bf16": Case(node_of=(1, 0, 0, 2), tokens=TOKENS, dtype=BF16),
    "one node": Case(node_of=(0, 0, 0, 0), tokens=TOKENS, slots=SLOTS),
    "padded": Case(node_of=(0, 0, 1, 1), tokens=TOKENS, slots=SLOTS, dtype=BF16, multiple=4),
    "no tokens": Case(node_of=(0, 0, 1, 1), tokens=(0, 0, 0, 0)),
    "fp8": Case(node_of=(0, 0, 1, 2), tokens=TOKENS, dtype=BF16, width=130, fp8=True),
    "fp8, a rank a node": Case(node_of=(2, 0, 3, 1), tokens=TOKENS, width=256, fp8=True),
    "fp8, one node": Case(node_of=(0,) * 4, tokens=TOKENS, slots=SLOTS, multiple=4, fp8=True),
}
# Sums of the same few terms in another order, whose parts are rounded to what travels. Gates'
# gradients are dot products whose order depends on where in memory rows happen to begin.
TOLERANCE = {torch.float32: 1e-6, FP64: 1e-12, BF16: 2**-7}


def _run_cases(rank: int, port: int) -> list[tuple]:
    """Of each case what the dispatch over nodes gives, and its flat twin; and rows per slot."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    ways = Ways(rows=dist.new_group(range(4)), gradients=dist.new_group(range(4)))
    results = []
    for case in CASES.values():
        with (
            mock.patch.object(node_module, "row_multiple", lambda *_, m=case.multiple: m),
            mock.patch.object(flat_module, "row_multiple", lambda *_, m=case.multiple: m),
        ):
            rows, flat_rows, placement = {}, {}, case.placement()
            own = NodeLimitedDispatch(
                placement, ways, CPU, Exchange(), rows, nodes=case.nodes, fp8=case.fp8
            )
            flat = AllToAllDispatch(placement, ways, CPU, Exchange(), flat_rows)
            found = there_and_back(own, case, rank)
            twin = there_and_back(flat, case, rank, rounds_first=case.fp8)
        same_rows = all(torch.equal(rows[layer], flat_rows[layer]) for layer in LAYERS)
        results.append((found, twin, same_rows))
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def results():
    by_rank = run_ranks(_run_cases, 4, free_port())
    return {name: [found[at] for found in by_rank] for at, name in enumerate(CASES)}


@pytest.mark.multiproc
@pytest.mark.parametrize("name", CASES)
def test_everything_is_what_sums_by_node_give(results, name) -> None:
    for (found, _, _), sums in zip(results[name], expected(CASES[name])):
        assert len(sums) == len(found) - len(LAYERS)  # the twin knows the gates' gradients
        for what, value in sums.items():
            assert found[what].dtype == value.dtype, what
            assert np.array_equal(found[what], value), what


@pytest.mark.multiproc
@pytest.mark.parametrize("name", CASES)
def test_the_flat_twin_delivers_the_same(results, name) -> None:
    for found, twin, same_rows in results[name]:
        assert same_rows
        for layer in LAYERS:
            for what in ("rows", "offsets", "dy"):
                assert np.array_equal(found[f"{what} {layer}"], twin[f"{what} {layer}"]), what
            for what in ("out", "dx", "dgates"):
                own, other = found[f"{what} {layer}"], twin[f"{what} {layer}"]
                bound = TOLERANCE[CASES[name].dtype]
                scale = max(np.abs(other).max(initial=0), 1)
                np.testing.assert_allclose(own, other, rtol=bound, atol=bound * scale)


def _placed_again(rank: int, port: int) -> list[dict[str, np.ndarray]]:
    """Of a dispatch that is given another placement, and of one that was made with it."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    ways = Ways(rows=dist.new_group(range(3)), gradients=dist.new_group(range(3)))
    before = Case(node_of=(0, 1, 1), tokens=(6, 3, 9), slots=(4, 3, 3))
    after = replace(before, slots=(2, 4, 5))
    found = []
    for fp8 in (False, True):
        common = {"nodes": before.nodes, "fp8": fp8}
        moved = NodeLimitedDispatch(before.placement(), ways, CPU, Exchange(), **common)
        there_and_back(moved, before, rank)
        moved.place(after.placement())
        made = NodeLimitedDispatch(after.placement(), ways, CPU, Exchange(), **common)
        found += [there_and_back(dispatch, after, rank) for dispatch in (moved, made)]
    dist.destroy_process_group()
    return found


@pytest.mark.multiproc
def test_another_placement_takes_the_place_of_the_first() -> None:
    for moved, made, moved_fp8, made_fp8 in run_ranks(_placed_again, 3, free_port()):
        for own, twin in ((moved, made), (moved_fp8, made_fp8)):
            assert all(np.array_equal(own[what], twin[what]) for what in twin)


def test_relays_share_the_sources() -> None:
    nodes = NodeMap.of(["a", "a", "a", "b", "b", "c"])
    assert nodes.node_of == (0, 0, 0, 1, 1, 2)
    assert nodes.ranks_on(1) == (3, 4)
    assert [nodes.relay(source, 1) for source in range(6)] == [3, 4, 3, 3, 4, 4]
    assert [nodes.relay(source, 0) for source in range(6)] == [0, 1, 2, 0, 1, 2]
    equal = NodeMap(node_of=(0, 0, 1, 1, 2, 2))
    assert [equal.relay(source, 1) for source in range(6)] == [2, 3, 2, 3, 2, 3]
    assert nodes.across(1, {0: 5, 2: 7, 3: 11, 5: 13}) == 24
    with pytest.raises(AssertionError):
        NodeMap(node_of=(0, 2))


def test_who_makes_a_dispatch_takes_the_one_that_fits() -> None:
    ways = SimpleNamespace(rows=SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    placement = contiguous_placement(tiny_config(), 2)

    def made(**options):
        return make_dispatch(placement, ways, CPU, Exchange(), **options)

    assert type(made()) is AllToAllDispatch
    assert type(made(nodes=NodeMap(node_of=(0, 0)))) is AllToAllDispatch
    over_nodes = made(nodes=NodeMap(node_of=(0, 1)))
    assert isinstance(over_nodes, NodeLimitedDispatch)
    assert not over_nodes.weighs_late
    one_node = made(fp8=True)
    assert isinstance(one_node, NodeLimitedDispatch)
    assert (one_node.nodes.num_nodes, one_node.weighs_late) == (1, True)
