"""Which node each group of experts lives on, where nodes differ in slots and in speed.

Shape suffixes: L layers, E experts, G groups, N nodes, D devices.
"""

from __future__ import annotations

import numpy as np

from dualray.parallel.placement import HIERARCHICAL, Floats, Ints, policy


def node_limits(
    num_experts: int, slots_D: Ints, node_D: Ints, num_groups: int
) -> list[tuple[Ints, Ints]]:
    """The least and most groups each node may have: at first in proportion to its slots, then
    as its slots allow. Empty if groups cannot stay on nodes, and placement is global.
    """
    num_nodes = int(node_D.max()) + 1
    if policy(num_groups, num_nodes) != HIERARCHICAL or num_experts % num_groups:
        return []
    size = num_experts // num_groups
    slots_N = np.bincount(node_D, slots_D).astype(np.int64)
    # A device cannot fill more slots than its node has different experts.
    least_N = np.array([-(-slots_D[node_D == n].max() // size) for n in range(num_nodes)])
    most_N = slots_N // size
    if (least_N > most_N).any() or not least_N.sum() <= num_groups <= most_N.sum():
        return []
    even_N = np.minimum(np.maximum(-(-num_groups * slots_N // slots_N.sum()), least_N), most_N)
    wide = [(least_N, most_N)]
    return [(least_N, even_N), *wide] if even_N.sum() >= num_groups else wide


def nodes_of_experts(
    load_LE: Floats,
    speed_D: Floats,
    node_D: Ints,
    num_groups: int,
    limits: tuple[Ints, Ints] | tuple[()],
) -> Ints:
    """Node of every expert [L, E]: groups stay together, within `limits` if there are nodes."""
    if not limits:
        return np.zeros(load_LE.shape, dtype=np.int64)
    size = load_LE.shape[1] // num_groups
    load_LG = load_LE.reshape(len(load_LE), num_groups, size).sum(axis=2)
    speed_N = np.bincount(node_D, speed_D).astype(np.float64)
    return np.repeat(_groups_to_nodes(load_LG, speed_N, *limits), size, axis=1)


def _groups_to_nodes(load_LG: Floats, speed_N: Floats, least_N: Ints, most_N: Ints) -> Ints:
    """Node of every group [L, G]: the heaviest first, where it would be done first."""
    num_layers, num_groups = load_LG.shape
    layers = np.arange(num_layers)
    node_LG = np.empty(load_LG.shape, dtype=np.int64)
    packed_LN = np.zeros((num_layers, len(speed_N)))
    number_LN = np.zeros(packed_LN.shape, dtype=np.int64)
    for left, group_L in zip(
        range(num_groups, 0, -1), np.argsort(-load_LG, axis=1, kind="stable").T
    ):
        load_L1 = load_LG[layers, group_L][:, None]
        missing_LN = np.maximum(least_N - number_LN, 0)
        # Once as few groups are left as nodes still need, only those nodes may take one.
        spare_L1 = left > missing_LN.sum(axis=1, keepdims=True)
        open_LN = (number_LN < most_N) & (spare_L1 | (missing_LN > 0))
        node_L = np.where(open_LN, (packed_LN + load_L1) / speed_N, np.inf).argmin(axis=1)
        node_LG[layers, group_L] = node_L
        packed_LN[layers, node_L] += load_L1[:, 0]
        number_LN[layers, node_L] += 1
    return node_LG
