"""Experts and redundant copies on devices that differ in slots and in speed.

Three greedy steps as on equal devices (`placement.py`), with time in place of load: groups go to
the node that would be done first, each node copies the expert with most load a copy, and copies
go, heaviest first, to the device that would be done first. A bounded local search follows
(`refine.py`). From that start it often finds no step to take; if the result is uneven it begins
again where experts are spread by number and only further copies by time. That brought 256
Zipf-distributed experts in 320 slots of 64 devices from 1.26 of the mean to 1.10. No device gets
two copies of one expert.

Shape suffixes: L layers, E experts, D devices, S physical slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dualray.errors import ConfigError
from dualray.parallel.group_nodes import node_limits, nodes_of_experts
from dualray.parallel.placement import Floats, Ints, checked_load, rebalance_experts
from dualray.parallel.refine import LEAST_STEP, Arrangement

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

    starts = []
    for limits in group_limits or [()]:
        node_LE = nodes_of_experts(load_LE, speed_D, node_D, num_groups, limits)
        copies_LE = _copies(load_LE, node_LE, slots_D, node_D)
        starts.append(
            tuple(
                _pack(load_LE, copies_LE, node_LE, slots_D, speed_D, node_D, spread)
                for spread in (False, True)
            )
        )
    equal = _on_equal_devices(load_LE, slots_D, speed_D, node_D, num_groups)
    if equal is not None:
        starts.insert(0, (equal, starts[0][1]))
    device_S = np.repeat(np.arange(len(slots_D)), slots_D)
    placed = []
    for row, load_E in enumerate(load_LE):
        begun = [
            [Arrangement(start[row], load_E, device_S, speed_D, node_D) for start in pair]
            for pair in starts
        ]
        placed.append(_best_of(begun, load_E.sum() / speed_D.sum()))
    return np.stack(placed)


def _best_of(starts: list[list[Arrangement]], mean_time: float) -> Ints:
    """What becomes of one layer's best start; the start itself if nothing is strictly better.

    Of each pair of starts the second is tried if the first does not come near the mean.
    """
    for first, _ in starts:
        first.separate()
    best, second = min(starts, key=lambda pair: pair[0].times.max())
    time, expert_S = best.times.max(), best.expert_S.copy()
    for start in (best, second):
        if time <= mean_time * (1 + GOOD_ENOUGH):
            break
        start.separate()
        start.improve(good_enough=GOOD_ENOUGH, max_changes=MAX_CHANGES)
        if start.times.max() < time * (1 - LEAST_STEP):
            time, expert_S = start.times.max(), start.expert_S.copy()
    return expert_S


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


def _copies(load_LE: Floats, node_LE: Ints, slots_D: Ints, node_D: Ints) -> Ints:
    """How often each expert is held [L, E]: at most once a device of its node."""
    layers = np.arange(len(load_LE))
    copies_LE = np.ones(load_LE.shape, dtype=np.int64)
    for node in range(node_D.max() + 1):
        mine_LE, mine_D = node_LE == node, node_D == node
        missing_L = slots_D[mine_D].sum() - mine_LE.sum(axis=1)
        for step in range(missing_L.max()):
            may_LE = mine_LE & (copies_LE < mine_D.sum())
            share_LE = np.where(may_LE, load_LE / copies_LE, -1.0)
            copies_LE[layers, share_LE.argmax(axis=1)] += step < missing_L
    return copies_LE


def _pack(
    load_LE: Floats,
    copies_LE: Ints,
    node_LE: Ints,
    slots_D: Ints,
    speed_D: Floats,
    node_D: Ints,
    spread: bool,
) -> Ints:
    """Copies onto the devices of their nodes [L, S]: the heaviest first, where it would be done
    first. With `spread`, the first copy of each expert goes where least slots are taken, and then
    the others follow.
    """
    share_LE = load_LE / copies_LE
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    item_LS, first_LS = (
        np.stack(rows) for rows in zip(*map(_items, order_LE, copies_LE, [spread] * len(order_LE)))
    )
    layers = np.arange(len(load_LE))
    placed_LS = np.empty(item_LS.shape, dtype=np.int64)
    packed_LD = np.zeros((len(layers), len(slots_D)))
    number_LD = np.zeros(packed_LD.shape, dtype=np.int64)
    held_LED = np.zeros((*load_LE.shape, len(slots_D)), dtype=bool)
    first_slot_D = np.cumsum(slots_D) - slots_D
    for item_L, first_L in zip(item_LS.T, first_LS.T):
        room_LD = (number_LD < slots_D) & (node_D == node_LE[layers, item_L][:, None])
        open_LD = room_LD & ~held_LED[layers, item_L]
        open_LD |= room_LD & ~open_LD.any(axis=1, keepdims=True)
        if first_L.any():
            taken_LD = np.where(open_LD, (number_LD + 1) / slots_D, np.inf)
            open_LD &= (taken_LD == taken_LD.min(axis=1, keepdims=True)) | ~first_L[:, None]
        share_L = share_LE[layers, item_L]
        time_LD = np.where(open_LD, (packed_LD + share_L[:, None]) / speed_D, np.inf)
        device_L = time_LD.argmin(axis=1)
        placed_LS[layers, first_slot_D[device_L] + number_LD[layers, device_L]] = item_L
        packed_LD[layers, device_L] += share_L
        number_LD[layers, device_L] += 1
        held_LED[layers, item_L, device_L] = True
    return placed_LS


def _items(order_E: Ints, copies_E: Ints, spread: bool) -> tuple[Ints, np.ndarray]:
    """One layer's copies in the order they are packed [S], and which are spread by number [S]."""
    copies_E = copies_E[order_E]
    if not spread:
        item_S = np.repeat(order_E, copies_E)
        return item_S, np.zeros(len(item_S), dtype=bool)
    item_S = np.concatenate([order_E, np.repeat(order_E, copies_E - 1)])
    return item_S, np.arange(len(item_S)) < len(order_E)


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
