"""Arrangements that a layer's experts might change to, from all new to little moved.

Shape suffixes: L layers, E experts, R expert ranks, S physical slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dualray.parallel.expert_moves import MoveCost
from dualray.parallel.group_nodes import node_limits
from dualray.parallel.packing import place_experts
from dualray.parallel.placement import Floats, Ints
from dualray.parallel.refine import FREE, Arrangement
from dualray.parallel.settle import Contents, settle
from dualray.parallel.slots import ExpertPlacement

GOOD_ENOUGH = 0.02
"""Improving in place stops within 2 % of the mean: the rest would move much for little."""
MAX_CHANGES = 64


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The expert ranks that experts are placed on."""

    slots: tuple[int, ...]
    nodes: tuple[int, ...]
    speeds: tuple[float, ...]
    """Rows a second; equal ones are exactly equal."""
    num_groups: int
    """Of experts, to be kept on one node each where they fit; 1 if nodes do not matter."""

    def numbered_nodes(self, num_experts: int) -> Ints:
        """Node of each rank [R], from 0; all 0 if groups cannot be kept on nodes."""
        node_R = np.unique(np.array(self.nodes), return_inverse=True)[1].reshape(-1)
        fits = node_limits(num_experts, np.array(self.slots), node_R, self.num_groups)
        return node_R if fits else np.zeros_like(node_R)


def candidates(
    load_LE: Floats, layers: list[int], placement: ExpertPlacement, ranks: Ranks, cost: MoveCost
) -> Iterator[list[Contents]]:
    """For every layer in turn, the experts of each rank in up to three arrangements.

    The first is made anew from the loads and laid over the present one. The others begin with
    what is there: all of it, or only the homes; free slots are filled with copies and the whole
    is improved. They are left out where the present placement breaks groups over nodes.
    """
    node_R = ranks.numbered_nodes(load_LE.shape[1])
    placed_LS = place_experts(load_LE, ranks.slots, ranks.speeds, node_R.tolist(), ranks.num_groups)
    ends = np.cumsum(ranks.slots)[:-1]
    kinds = list(zip(ranks.slots, ranks.speeds))
    for layer, load_E, placed_S in zip(layers, load_LE, placed_LS):
        fresh = [part.tolist() for part in np.split(placed_S, ends)]
        found: list[Contents] = [
            settle(fresh, placement, layer, kinds=kinds, nodes=node_R.tolist(), cost=cost)
        ]
        starts = [placement.held[layer]]
        if any(placement.copies(layer, rank) for rank in range(len(ranks.slots))):
            starts.append(
                tuple(placement.homes(layer, rank) for rank in range(placement.num_ranks))
            )
        for start in starts:
            kept = _kept(start, placement.home_ranks(layer), ranks, node_R)
            if kept is not None:
                found.append(_improved(kept, load_E, ranks, node_R))
        yield found


def _kept(
    start: Contents, homes: dict[int, int], ranks: Ranks, node_R: Ints
) -> list[list[int]] | None:
    """`start` without copies that left their group's node; None if its homes cannot stay."""
    num_experts = len(homes)
    size = num_experts // ranks.num_groups if node_R.any() else 1
    home_node = {expert: node_R[rank] for expert, rank in homes.items()}
    if any(home_node[e] != home_node[e // size * size] for e in homes):
        return None
    kept = [[e for e in part if home_node[e] == node] for part, node in zip(start, node_R)]
    of_node = np.bincount(list(home_node.values()), minlength=node_R.max() + 1)
    fits = all(
        len(part) <= slots <= of_node[node] for part, slots, node in zip(kept, ranks.slots, node_R)
    )
    return kept if fits else None


def _improved(kept: list[list[int]], load_E: Floats, ranks: Ranks, node_R: Ints) -> Contents:
    expert_S = np.concatenate(
        [part + [FREE] * (slots - len(part)) for part, slots in zip(kept, ranks.slots)]
    ).astype(np.int64)
    device_S = np.repeat(np.arange(len(ranks.slots)), ranks.slots)
    arrangement = Arrangement(expert_S, load_E, device_S, np.array(ranks.speeds), node_R)
    arrangement.fill()
    arrangement.improve(good_enough=GOOD_ENOUGH, max_changes=MAX_CHANGES)
    return [part.tolist() for part in np.split(arrangement.expert_S, np.cumsum(ranks.slots)[:-1])]
