"""Dispatch, experts and combine of random tokens; and what must come out, from all ranks at once.

R ranks, T tokens of one, K choices, D width, n nodes. Experts are elementwise functions, so that
their bits do not depend on which rows they are given together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from support.models import tiny_config
from torch import Tensor

from dualray.kernels.quantize import dequantise, quantise
from dualray.kernels.ragged_sum import ragged_sum, weighted_rows
from dualray.model.context import ExpertDispatch, Routing
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement, contiguous_placement

LAYERS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Ranks with their nodes, slots and tokens."""

    node_of: tuple[int, ...]
    tokens: tuple[int, ...]
    slots: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    width: int = 24
    multiple: int = 1
    fp8: bool = False

    @property
    def nodes(self) -> NodeMap:
        return NodeMap(node_of=self.node_of)

    def placement(self) -> ExpertPlacement:
        """Layer 2 has the ranks of layer 1 in reverse, with their slots and experts."""
        first = contiguous_placement(tiny_config(), len(self.node_of), self.slots)
        held, homes = first.held[1], first.num_homes[1]
        return ExpertPlacement(held={1: held, 2: held[::-1]}, num_homes={1: homes, 2: homes[::-1]})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    x_TD: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    dy_TD: Tensor


def inputs(case: Case, rank: int, layer: int) -> Inputs:
    """What a rank's layer is given. Nobody chooses the last expert."""
    config = tiny_config()
    generator = torch.Generator().manual_seed(100 * layer + rank)
    T = case.tokens[rank]
    x = torch.randn(T, case.width, generator=generator, dtype=torch.float64).to(case.dtype)
    dy = torch.randn(T, case.width, generator=generator, dtype=torch.float64).to(case.dtype)
    scores = torch.rand(T, config.n_routed_experts, generator=generator, dtype=torch.float64)
    scores[:, -1] = 0
    gates, experts = scores.topk(config.num_experts_per_tok)
    return Inputs(
        x_TD=x,
        experts_TK=experts,
        gates_TK=gates.to(torch.promote_types(case.dtype, torch.float32)),
        dy_TD=dy,
    )


def through_fp8(x_TD: Tensor) -> Tensor:
    """What is left of rows that travel in FP8."""
    return dequantise(*quantise(x_TD, power_of_two=True), x_TD.dtype)


def expert(rows: Tensor, number: Tensor) -> Tensor:
    """Row n through expert number[n]."""
    return rows * (number[..., None] + 2).to(rows.dtype) + 1


def there_and_back(
    dispatch: ExpertDispatch, case: Case, rank: int, *, rounds_first: bool = False
) -> dict[str, np.ndarray]:
    """All layers forward, then backward. `rounds_first` lets values and gradients go through FP8
    before they are sent, and not on their way."""
    found: dict[str, Tensor] = {}
    wanted, outs, dys = {}, [], []
    for layer in LAYERS:
        given = inputs(case, rank, layer)
        x, gates, dy = given.x_TD, given.gates_TK.requires_grad_(), given.dy_TD
        if rounds_first:
            x, dy = through_fp8(x), through_fp8(dy)
        x.requires_grad_()
        routing = Routing(experts_TK=given.experts_TK, gates_TK=gates, scores_TE=gates)
        dispatched = dispatch.dispatch(layer, x, routing)
        held = torch.tensor(case.placement().held[layer][rank])
        row = torch.arange(len(dispatched.rows_ND))
        slot = torch.bucketize(row, dispatched.offsets.long(), right=True)
        y = expert(dispatched.rows_ND, held[slot])
        out = dispatch.combine(y, dispatched)
        with torch.inference_mode():  # as in serving
            again = dispatch.dispatch(layer, x, routing)
            served = dispatch.combine(expert(again.rows_ND, held[slot]), again)
        assert torch.equal(served, out)
        names = {"rows": dispatched.rows_ND, "offsets": dispatched.offsets, "out": out}
        found |= {f"{name} {layer}": value.detach() for name, value in names.items()}
        wanted |= {f"dy {layer}": y, f"dx {layer}": x, f"dgates {layer}": gates}
        outs.append(out)
        dys.append(dy)
    found |= zip(wanted, torch.autograd.grad(outs, list(wanted.values()), dys))
    return {name: _array(value) for name, value in found.items()}


def _array(value: Tensor) -> np.ndarray:
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()


def expected(case: Case) -> list[dict[str, np.ndarray]]:
    """What `there_and_back` of a dispatch over nodes must give to each rank.

    Sums are the kernel's, so that bits can be compared: of a token's choices on a node in their
    order, rounded to what travels; then of its nodes in theirs.
    """
    found: list[dict[str, Tensor]] = [{} for _ in case.node_of]
    for layer in LAYERS:
        arrivals = [[[] for _ in range(slots)] for slots in case.placement().slots(layer)]
        for source in range(len(case.node_of)):
            _follow(case, layer, source, arrivals, found[source])
        for rank, by_slot in enumerate(arrivals):
            rows, gradients, ends = [], [], []
            for arrived in by_slot:
                padding = -len(arrived) % case.multiple
                empty = torch.zeros(case.width, dtype=case.dtype)
                rows += [row for row, _ in arrived] + [empty] * padding
                gradients += [gradient for _, gradient in arrived] + [empty] * padding
                ends.append(len(rows))
            nothing = torch.zeros(0, case.width, dtype=case.dtype)
            found[rank][f"rows {layer}"] = torch.stack(rows) if rows else nothing
            found[rank][f"dy {layer}"] = torch.stack(gradients) if rows else nothing
            found[rank][f"offsets {layer}"] = torch.tensor(ends, dtype=torch.int32)
    return [{name: _array(value) for name, value in of.items()} for of in found]


def _follow(case: Case, layer: int, source: int, arrivals, found: dict[str, Tensor]) -> None:
    """One source's tokens to their experts and back, with their gradients."""
    given = inputs(case, source, layer)
    x, dy = given.x_TD, given.dy_TD
    if case.fp8:
        x, dy = through_fp8(x), through_fp8(dy)
    T, K = given.experts_TK.shape
    node_TK = torch.zeros(T, K, dtype=torch.int64)
    token_N = torch.arange(T).repeat_interleave(K)
    d_y_TKD = weighted_rows(dy, token_N, given.gates_TK.flatten()).view(T, K, case.width)
    rank_of = [rank for rank, n in enumerate(case.placement().slots(layer)) for _ in range(n)]
    turn = Counter(dict.fromkeys(range(tiny_config().n_routed_experts), source))
    for t in range(T):
        for k in range(K):
            number = int(given.experts_TK[t, k])
            slots = case.placement().slots_of(layer)[number]
            slot = slots[turn[number] % len(slots)]
            turn[number] += 1
            rank = rank_of[slot]
            node_TK[t, k] = case.node_of[rank]
            arrivals[rank][slot - rank_of.index(rank)].append((x[t], d_y_TKD[t, k]))
    y_TKD = expert(x[:, None], given.experts_TK)
    d_row_TKD = d_y_TKD * (given.experts_TK[..., None] + 2).to(case.dtype)
    found[f"out {layer}"] = sums_by_node(y_TKD, node_TK, given.gates_TK)
    found[f"dx {layer}"] = sums_by_node(d_row_TKD, node_TK, None)


def sums_by_node(values_TKD: Tensor, node_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """(T, D)"""
    T, num_nodes = len(node_TK), int(node_TK.max()) + 1 if node_TK.numel() else 1
    key = (torch.arange(T)[:, None] * num_nodes + node_TK).flatten()
    order = torch.argsort(key, stable=True)
    bags, sizes = key[order].unique_consecutive(return_counts=True)
    weights = None if weights_TK is None else weights_TK.flatten()[order]
    sums = ragged_sum(values_TKD.flatten(0, 1), order, sizes, weights)
    num_bags_T = torch.bincount(bags // num_nodes, minlength=T)
    return ragged_sum(sums, torch.arange(len(sums)), num_bags_T)
