"""Experts and redundant copies on devices that differ in slots and in speed.

Three greedy steps as on equal devices (`placement.py`), with time in place of load: groups go to
the node that would be done first, each node copies the expert with most load a copy, and copies
go, heaviest first, to the device that would be done first. A bounded local search follows
(`refine.py`). No device gets two copies of one expert.

Shape suffixes: L layers, E experts, G groups, N nodes, D devices, S physical slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dualray.errors import ConfigError
from dualray.parallel.placement import (
    HIERARCHICAL,
    Floats,
    Ints,
    checked_load,
    policy,
    rebalance_experts,
)
from dualray.parallel.refine import Arrangement

GOOD_ENOUGH = 0.01
"""Relative to the mean time of a node's devices: the search stops there."""
MAX_CHANGES = 64
"""Of the local search, per layer."""


def place_experts(
    load: ArrayLike,
    slots_per_device: Sequence[int],
    speed_per_device: Sequence[float],
    node_of_device: Sequence[int],
    num_groups: int,
) -> Ints:
    """Fill every slot so that the slowest device of each layer is done as early as possible.

    load: [L, E], tokens per expert, split evenly over an expert's copies; speeds are relative.
    Groups stay on one node each where the nodes divide them and have the slots. On equal
    devices the result is never less balanced than `rebalance_experts`'s, if that has no two
    copies of an expert on a device.

    Returns the expert in each slot, int64 [L, sum of slots], device by device.

    Raises ConfigError for loads or speeds that are no such numbers, and slots that do not hold
    the experts or exceed them.
    """
    load_LE = checked_load(load)
    slots_D = np.asarray(slots_per_device, dtype=np.int64)
    speed_D = np.asarray(speed_per_device, dtype=np.float64)
    _check_devices(load_LE.shape[1], slots_D, speed_D, len(node_of_device))
    node_D = np.unique(np.asarray(node_of_device), return_inverse=True)[1].reshape(-1)
    group_limits = node_limits(load_LE.shape[1], slots_D, node_D, num_groups)
    if not group_limits:
        node_D = np.zeros_like(node_D)

    starts = [_pack(load_LE, slots_D, speed_D, node_D, num_groups, x) for x in group_limits or [()]]
    equal = _on_equal_devices(load_LE, slots_D, speed_D, node_D, num_groups)
    if equal is not None:
        starts.insert(0, equal)
    device_S = np.repeat(np.arange(len(slots_D)), slots_D)
    return np.stack(
        [
            _best_of([start[row] for start in starts], load_E, device_S, speed_D, node_D)
            for row, load_E in enumerate(load_LE)
        ]
    )


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


def _best_of(
    starts: list[Ints], load_E: Floats, device_S: Ints, speed_D: Floats, node_D: Ints
) -> Ints:
    """The best of one layer's arrangements, or what becomes of it if that is strictly better."""
    found: list[Arrangement] = []
    for start in starts:
        found.append(Arrangement(start, load_E, device_S, speed_D, node_D))
        found[-1].separate()
    best = min(found, key=lambda one: one.times.max())
    before, expert_S = best.times.max(), best.expert_S.copy()
    best.improve(good_enough=GOOD_ENOUGH, max_changes=MAX_CHANGES)
    return best.expert_S if best.times.max() < before else expert_S


def _on_equal_devices(
    load_LE: Floats, slots_D: Ints, speed_D: Floats, node_D: Ints, num_groups: int
) -> Ints | None:
    """What `rebalance_experts` says if devices and nodes are equal, else None."""
    devices_N = np.bincount(node_D)
    if len({*slots_D}) > 1 or len({*speed_D}) > 1 or len({*devices_N}) > 1:
        return None
    num_groups = num_groups if len(devices_N) > 1 else 1
    placed_LS = rebalance_experts(
        load_LE, int(slots_D.sum()), num_groups, len(devices_N), len(slots_D)
    )[0]
    # Its devices go node by node; ours may alternate.
    place_D = np.argsort(np.argsort(node_D, kind="stable"))
    return placed_LS.reshape(len(load_LE), len(slots_D), -1)[:, place_D].reshape(placed_LS.shape)


def _pack(
    load_LE: Floats,
    slots_D: Ints,
    speed_D: Floats,
    node_D: Ints,
    num_groups: int,
    limits: tuple[Ints, Ints] | tuple[()],
) -> Ints:
    """The greedy placement [L, S], with groups on nodes within `limits`, or without nodes."""
    node_LE = np.zeros(load_LE.shape, dtype=np.int64)
    if limits:
        size = load_LE.shape[1] // num_groups
        load_LG = load_LE.reshape(len(load_LE), num_groups, size).sum(axis=2)
        speed_N = np.bincount(node_D, speed_D).astype(np.float64)
        node_LE = np.repeat(_groups_to_nodes(load_LG, speed_N, *limits), size, axis=1)
    placed_LS = np.empty((len(load_LE), slots_D.sum()), dtype=np.int64)
    node_S = np.repeat(node_D, slots_D)
    for node in range(node_D.max() + 1):
        mine_D = node_D == node
        copies_LE = _copies(load_LE, node_LE == node, int(slots_D[mine_D].sum()), int(mine_D.sum()))
        placed_LS[:, node_S == node] = _onto_devices(
            load_LE, copies_LE, slots_D[mine_D], speed_D[mine_D]
        )
    return placed_LS


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


def _copies(load_LE: Floats, mine_LE: np.ndarray, num_slots: int, num_devices: int) -> Ints:
    """How often each expert of a node is held [L, E], 0 for others; at most once a device."""
    layers = np.arange(len(load_LE))
    copies_LE = mine_LE.astype(np.int64)
    missing_L = num_slots - copies_LE.sum(axis=1)
    for step in range(missing_L.max()):
        may_LE = mine_LE & (copies_LE < num_devices)
        share_LE = np.where(may_LE, load_LE / np.maximum(copies_LE, 1), -1.0)
        copies_LE[layers, share_LE.argmax(axis=1)] += step < missing_L
    return copies_LE


def _onto_devices(load_LE: Floats, copies_LE: Ints, slots_D: Ints, speed_D: Floats) -> Ints:
    """Copies onto one node's devices [L, S]: the heaviest first, where it would be done first."""
    layers = np.arange(len(load_LE))
    share_LE = load_LE / np.maximum(copies_LE, 1)
    heaviest_first_LE = np.argsort(-share_LE, axis=1, kind="stable")
    item_LS = np.stack(
        [np.repeat(order, copies[order]) for order, copies in zip(heaviest_first_LE, copies_LE)]
    )
    placed_LS = np.empty(item_LS.shape, dtype=np.int64)
    packed_LD = np.zeros((len(layers), len(slots_D)))
    number_LD = np.zeros(packed_LD.shape, dtype=np.int64)
    first_D = np.cumsum(slots_D) - slots_D
    # Copies of an expert come in a row; a device that has one is passed over if another has room.
    has_it_LD = np.zeros(packed_LD.shape, dtype=bool)
    before_L = np.full(len(layers), -1)
    for item_L in item_LS.T:
        has_it_LD &= (item_L == before_L)[:, None]
        share_L = share_LE[layers, item_L]
        room_LD = number_LD < slots_D
        open_LD = room_LD & ~has_it_LD
        open_LD |= room_LD & ~open_LD.any(axis=1, keepdims=True)
        time_LD = (packed_LD + share_L[:, None]) / speed_D
        device_L = np.where(open_LD, time_LD, np.inf).argmin(axis=1)
        placed_LS[layers, first_D[device_L] + number_LD[layers, device_L]] = item_L
        packed_LD[layers, device_L] += share_L
        number_LD[layers, device_L] += 1
        has_it_LD[layers, device_L] = True
        before_L = item_L
    return placed_LS


def _check_devices(num_experts: int, slots_D: Ints, speed_D: Floats, num_nodes: int) -> None:
    if not len(slots_D) == len(speed_D) == num_nodes or not len(slots_D):
        raise ConfigError(
            f"slots are given for {len(slots_D)} devices, speeds for {len(speed_D)} and nodes for "
            f"{num_nodes}, and they must be as many, at least 1",
            hint="give each device its slots, speed and node",
        )
    if slots_D.min() < 1 or slots_D.max() > num_experts or slots_D.sum() < num_experts:
        raise ConfigError(
            f"slots are {slots_D.tolist()}; a device must have 1 to {num_experts}, the number of "
            f"experts, and all together at least {num_experts}",
            hint="change the number of slots",
        )
    bad = np.flatnonzero(~np.isfinite(speed_D) | (speed_D <= 0))
    if len(bad):
        raise ConfigError(
            f"the speed of device {bad[0]} is {speed_D[bad[0]]} and must be finite and above 0",
            hint="leave out speeds that were not measured",
        )
