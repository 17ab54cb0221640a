"""EPLB in plain loops over plain lists: the slow twin of `dualray.parallel.placement`."""

from __future__ import annotations


def pack(weights: list[float], num_packs: int) -> tuple[list[int], list[int]]:
    """Pack of every item, and its rank within it."""
    share = len(weights) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    if share == 1:
        packs = [[item] for item in range(len(weights))]
    else:
        totals = [0.0] * num_packs
        for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            room = [p for p in range(num_packs) if len(packs[p]) < share]
            lightest = min(room, key=lambda p: (totals[p], p))
            packs[lightest].append(item)
            totals[lightest] += weights[item]
    where = {item: (p, rank) for p, items in enumerate(packs) for rank, item in enumerate(items)}
    return [where[i][0] for i in range(len(weights))], [where[i][1] for i in range(len(weights))]


def replicate(weights: list[float], num_slots: int) -> list[int]:
    """The experts in the order their copies are made."""
    made = list(range(len(weights)))
    while len(made) < num_slots:
        ratios = [weight / made.count(expert) for expert, weight in enumerate(weights)]
        made.append(ratios.index(max(ratios)))
    return made


def place_layer(
    load: list[float], num_replicas: int, num_groups: int, num_nodes: int, num_devices: int
) -> tuple[list[int], dict[int, list[int]]]:
    """The expert in each slot, and every expert's slots in the order its copies were made."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    size = len(load) // num_groups
    of_group = [sum(load[g * size : (g + 1) * size]) for g in range(num_groups)]
    node_of_group, rank_of_group = pack(of_group, num_nodes)
    slots: list[int] = [-1] * num_replicas
    slots_of: dict[int, list[int]] = {expert: [] for expert in range(len(load))}
    for node in range(num_nodes):
        groups = [g for g in range(num_groups) if node_of_group[g] == node]
        groups.sort(key=lambda g: rank_of_group[g])
        experts = [e for g in groups for e in range(g * size, (g + 1) * size)]
        made = replicate([load[e] for e in experts], num_replicas // num_nodes)
        shares = [load[experts[i]] / made.count(i) for i in made]
        device, rank = pack(shares, num_devices // num_nodes)
        for copy, index in enumerate(made):
            on_node = device[copy] * (num_replicas // num_devices) + rank[copy]
            slot = node * (num_replicas // num_nodes) + on_node
            slots[slot] = experts[index]
            slots_of[experts[index]].append(slot)
    return slots, slots_of


def device_times(
    load: list[float], parts: list[list[int]], speeds: list[float] | None = None
) -> list[float]:
    """Load over speed of every device, an expert's load being split evenly over its copies."""
    everything = [expert for part in parts for expert in part]
    speeds = speeds or [1.0] * len(parts)
    return [
        sum(load[expert] / everything.count(expert) for expert in part) / speed
        for part, speed in zip(parts, speeds)
    ]
