"""Experts and redundant copies on equal devices: DeepSeek's published heuristic (EPLB).

arXiv 2412.19437, section 3.4. Three greedy steps over the loads of all layers at once: expert
groups are packed onto nodes, each node copies whichever of its experts has the most load a
copy, and each node's copies are packed onto its devices. An expert's load is split evenly over
its copies. Ties go to the lower index, so that every process finds the same placement.

Shape suffixes: L layers, E experts, G groups, S physical slots, R rows that are decided
independently of each other (a layer, or one node of a layer), I items, P packs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dualray.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HIERARCHICAL, GLOBAL = "hierarchical", "global"


def rebalance_experts(
    load: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int
) -> tuple[Ints, Ints, Ints]:
    """Place `num_replicas` copies of E experts on equal devices, the same number on each.

    load: [L, E], tokens per expert in whatever unit. Slots are numbered device by device, and
    devices node by node. Groups stay on one node each if the nodes divide them (`policy`).

    Returns physical_to_logical [L, num_replicas], the expert in each slot; logical_to_physical
    [L, E, most copies of an expert], the slots of each expert, padded with -1; and
    replica_count [L, E]; all int64. A device may get two copies of one expert.

    Raises ConfigError for counts that do not divide, and loads that are no finite counts.
    """
    load_LE = checked_load(load)
    num_experts = load_LE.shape[1]
    if min(num_groups, num_nodes, num_devices) < 1:
        raise ConfigError(
            f"there are {num_groups} groups, {num_nodes} nodes and {num_devices} devices, and "
            "there must be at least 1 of each",
            hint="count again",
        )
    if policy(num_groups, num_nodes) == GLOBAL:
        num_groups = num_nodes = 1
    _check_counts(num_experts, num_replicas, num_groups, num_nodes, num_devices)

    order_LE = _experts_by_node(load_LE, num_groups, num_nodes)
    share = num_experts // num_nodes
    load_RE = np.take_along_axis(load_LE, order_LE, axis=1).reshape(-1, share)
    expert_RS, copy_RS, count_RE = _replicate(load_RE, num_replicas // num_nodes)
    load_RS = np.take_along_axis(load_RE / count_RE, expert_RS, axis=1)
    slot_RS = pack_evenly(load_RS, num_devices // num_nodes)

    # From copies in the order they were made to slots, and from a node's own count of its
    # experts to the model's.
    made_RS = np.argsort(slot_RS, axis=1)
    first_R1 = (np.arange(len(load_RE)) % num_nodes * share)[:, None]
    shape = (len(load_LE), num_replicas)
    place_LS = (np.take_along_axis(expert_RS, made_RS, axis=1) + first_R1).reshape(shape)
    physical_to_logical = np.take_along_axis(order_LE, place_LS, axis=1)
    copy_LS = np.take_along_axis(copy_RS, made_RS, axis=1).reshape(shape)
    replica_count = np.empty_like(order_LE)
    np.put_along_axis(replica_count, order_LE, count_RE.reshape(order_LE.shape), axis=1)

    logical_to_physical = np.full((*load_LE.shape, replica_count.max()), -1)
    layers_L1 = np.arange(len(load_LE))[:, None]
    logical_to_physical[layers_L1, physical_to_logical, copy_LS] = np.arange(num_replicas)
    return physical_to_logical, logical_to_physical, replica_count


def policy(num_groups: int, num_nodes: int) -> str:
    """`hierarchical` if every node can have the same number of whole groups, else `global`.

    Under the global policy groups are spread over nodes: a token may then reach any node.
    """
    return HIERARCHICAL if num_groups % num_nodes == 0 else GLOBAL


def policy_note(num_groups: int, num_nodes: int) -> str:
    """What to tell a person about the policy; empty if there is nothing to tell."""
    if policy(num_groups, num_nodes) == HIERARCHICAL:
        return ""
    return (
        f"model.n_group {num_groups} is not divisible by {num_nodes} nodes, so experts are placed "
        "without regard to nodes and a token may reach all of them"
    )


def checked_load(load: ArrayLike) -> Floats:
    """`load` as float64 [L, E]; ConfigError if it is of another shape or not finite and >= 0."""
    load_LE = np.asarray(load, dtype=np.float64)
    if load_LE.ndim != 2 or not load_LE.size:
        raise ConfigError(
            f"the load's shape is {load_LE.shape} and must be [layers, experts], both at least 1",
            hint="give one row of loads per layer",
        )
    bad = np.argwhere(~np.isfinite(load_LE) | (load_LE < 0))
    if len(bad):
        layer, expert = bad[0]
        raise ConfigError(
            f"the load of layer {layer}, expert {expert} is {load_LE[layer, expert]} and must be "
            "a finite number of at least 0",
            hint="give counts of tokens",
        )
    return load_LE


def pack_evenly(load_RI: Floats, num_packs: int) -> Ints:
    """Items into packs of equal number, heaviest first, each into the lightest that has room.

    num_packs divides I. Returns places [R, I]: pack * items per pack + rank within the pack.
    """
    num_rows, num_items = load_RI.shape
    share = num_items // num_packs
    rows = np.arange(num_rows)
    if share == 1:
        return np.broadcast_to(np.arange(num_items), load_RI.shape)
    heaviest_first_RI = np.argsort(-load_RI, axis=1, kind="stable")
    place_RI = np.empty(load_RI.shape, dtype=np.int64)
    packed_RP = np.zeros((num_rows, num_packs))
    number_RP = np.zeros((num_rows, num_packs), dtype=np.int64)
    for item_R in heaviest_first_RI.T:
        pack_R = packed_RP.argmin(axis=1)
        rank_R = number_RP[rows, pack_R]
        place_RI[rows, item_R] = pack_R * share + rank_R
        number_RP[rows, pack_R] = rank_R + 1
        packed_RP[rows, pack_R] += load_RI[rows, item_R]
        # A full pack counts as infinitely heavy, so that no more goes there.
        full_R = rank_R + 1 == share
        packed_RP[rows[full_R], pack_R[full_R]] = np.inf
    return place_RI


def _experts_by_node(load_LE: Floats, num_groups: int, num_nodes: int) -> Ints:
    """[L, E]: the experts, those of the first node first, with whole groups on each node."""
    size = load_LE.shape[1] // num_groups
    load_LG = load_LE.reshape(len(load_LE), num_groups, size).sum(axis=2)
    group_LG = np.argsort(pack_evenly(load_LG, num_nodes), axis=1)
    return (group_LG[:, :, None] * size + np.arange(size)).reshape(load_LE.shape)


def _replicate(load_RE: Floats, num_slots: int) -> tuple[Ints, Ints, Ints]:
    """One copy of each expert, and each further one of that with the most load a copy.

    Returns, in the order made, the copied expert [R, S] and how many copies it had [R, S], and
    the number of copies at the end [R, E].
    """
    num_rows, num_experts = load_RE.shape
    rows = np.arange(num_rows)
    expert_RS = np.tile(np.arange(num_slots), (num_rows, 1))
    copy_RS = np.zeros((num_rows, num_slots), dtype=np.int64)
    count_RE = np.ones(load_RE.shape, dtype=np.int64)
    for slot in range(num_experts, num_slots):
        expert_R = (load_RE / count_RE).argmax(axis=1)
        expert_RS[:, slot] = expert_R
        copy_RS[:, slot] = count_RE[rows, expert_R]
        count_RE[rows, expert_R] += 1
    return expert_RS, copy_RS, count_RE


def _check_counts(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_devices: int
) -> None:
    if num_replicas < num_experts:
        raise ConfigError(
            f"{num_replicas} slots cannot hold {num_experts} experts: every expert needs one",
            hint=f"give at least {num_experts} slots",
        )
    if num_replicas % num_devices:
        raise ConfigError(
            f"{num_replicas} slots are not divisible by {num_devices} devices",
            hint="choose a number of redundant copies that makes them so",
        )
    if num_devices % num_nodes:
        raise ConfigError(
            f"{num_devices} devices are not divisible by {num_nodes} nodes",
            hint="give every node the same number of devices",
        )
    if num_experts % num_groups:
        raise ConfigError(
            f"model.n_routed_experts {num_experts} is not divisible by model.n_group {num_groups}",
            hint="choose a number of groups that divides the experts",
        )
