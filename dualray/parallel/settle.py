"""Which of several equal ranks takes which part of a new placement, so that little has to move.

A placement says what belongs together on a device; devices of one node that have equal slots and
speeds may be exchanged, and so may whole nodes with equal devices. Every part goes to where most
of it already is. Then every expert gets a home: where it was, if that rank still holds it.

Shape suffixes: E experts, D devices, N nodes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from dualray.parallel.expert_moves import MoveCost
from dualray.parallel.placement import Ints
from dualray.parallel.slots import ExpertPlacement

Contents = Sequence[Sequence[int]]
"""The experts of each rank, in any order."""


def settle(
    contents: Contents,
    old: ExpertPlacement,
    layer: int,
    *,
    kinds: Sequence[Hashable],
    nodes: Sequence[int],
    cost: MoveCost,
) -> list[tuple[int, ...]]:
    """`contents`, each part on the rank where least has to move to it.

    kinds: a rank's slots and speed; only ranks of one kind are exchanged, and only within their
    node or along with it. Under a global policy give all ranks the same node.
    """
    num_experts = len(old.home_ranks(layer))
    held_DE = np.zeros((len(contents), num_experts), dtype=np.int64)
    for rank, experts in enumerate(contents):
        held_DE[rank, list(experts)] = 1
    saved_DE = np.zeros_like(held_DE)
    for rank, experts in enumerate(old.held[layer]):
        saved_DE[rank, list(experts)] = cost.weight_bytes * cost.sharers
        saved_DE[rank, list(old.homes(layer, rank))] += cost.state_bytes

    members = [[r for r, node in enumerate(nodes) if node == n] for n in sorted(set(nodes))]
    by_kind = [sorted(members_n, key=lambda rank: repr(kinds[rank])) for members_n in members]
    profiles = [tuple(kinds[rank] for rank in members_n) for members_n in by_kind]
    held_NE = np.stack([held_DE[m].max(axis=0) for m in members])
    saved_NE = np.stack([saved_DE[m].max(axis=0) for m in members])
    placed: list[tuple[int, ...]] = [()] * len(contents)
    for new_node, old_node in enumerate(_match(held_NE, saved_NE, profiles)):
        parts, ranks = by_kind[new_node], by_kind[old_node]
        match = _match(held_DE[parts], saved_DE[ranks], [kinds[rank] for rank in ranks])
        for part, place in zip(parts, match):
            placed[ranks[place]] = tuple(contents[part])
    return placed


def with_homes(
    contents: Contents, homes_before: dict[int, int]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """`held` and `num_homes` of a layer: every rank's experts in order, homes first.

    A home stays if its rank still holds the expert. Others go, lowest expert first, to the holder
    with fewest homes, so that master weights and moments are spread evenly.
    """
    holders: dict[int, list[int]] = {}
    for rank, experts in enumerate(contents):
        for expert in experts:
            holders.setdefault(expert, []).append(rank)
    homes = {expert: home for expert, home in homes_before.items() if home in holders[expert]}
    homes |= {e: ranks[0] for e, ranks in holders.items() if e not in homes and len(ranks) == 1}
    number = Counter(homes.values())
    for expert in sorted(holders.keys() - homes.keys()):
        homes[expert] = min(holders[expert], key=lambda rank: (number[rank], rank))
        number[homes[expert]] += 1
    held = tuple(
        tuple(sorted(experts, key=lambda expert: (homes[expert] != rank, expert)))
        for rank, experts in enumerate(contents)
    )
    return held, tuple(number[rank] for rank in range(len(contents)))


def _match(held_PE: Ints, saved_PE: Ints, kinds: Sequence[Hashable]) -> list[int]:
    """For every part the place of its own kind where much of it is saved from moving.

    Parts and places of one index are of one kind. Greedy by the largest saving, ties to the
    part's own place; then two parts change places as long as that saves more.
    """
    saved = held_PE @ saved_PE.T
    codes = {kind: code for code, kind in enumerate(dict.fromkeys(kinds))}
    kind_P = np.array([codes[kind] for kind in kinds])
    same = kind_P[:, None] == kind_P
    num_parts = len(kind_P)
    own = np.eye(num_parts, dtype=np.int64)
    order = np.lexsort((-own.reshape(-1), -saved.reshape(-1)))
    match = np.full(num_parts, -1)
    taken = np.zeros(num_parts, dtype=bool)
    for part, place in zip(*np.divmod(order, num_parts)):
        if same[part, place] and match[part] < 0 and not taken[place]:
            match[part], taken[place] = place, True
    parts = np.arange(num_parts)
    while True:
        now = saved[parts, match]
        swapped = saved[:, match]
        more = np.where(same, swapped + swapped.T - now - now[:, None], 0)
        if more.max() <= 0:
            return match.tolist()
        one, other = np.unravel_index(more.argmax(), more.shape)
        match[[one, other]] = match[[other, one]]
