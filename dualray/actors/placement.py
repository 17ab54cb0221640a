"""A place for every worker: one placement group, waited for if an autoscaler can bring nodes.

What fits is counted per node, since a worker's CPUs and GPUs come from one node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ray._private.state import available_resources_per_node, total_resources_per_node
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from dualray.actors import autoscaler
from dualray.actors.cluster import ClusterConfig
from dualray.errors import ResourceError

_POLL_S = 0.2
# A run that has just ended still holds its resources for a moment, and a head that has just
# started has an autoscaler that has not looked around yet (it does every 5 s).
_SETTLE_S = 5.0
_FIRST_REPORT_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Room:
    """How many workers the cluster's nodes hold, and the sums behind it."""

    num_workers: int
    num_nodes: int
    cpus: float
    gpus: float


def reserve(
    num_workers: int,
    cluster: ClusterConfig,
    say: Callable[[str], None],
    *,
    embedded: bool = False,
    lifetime: str | None = None,
) -> PlacementGroup:
    """Reserve one bundle per worker and return the group once every bundle is placed.

    Where it does not fit now, an active autoscaler gets up to `cluster.wait_for_resources_s`;
    `say` hears what is waited for and what is on the way. `embedded` rules an autoscaler out.
    `lifetime="detached"` lets the group outlive this process's Ray job. Raises ResourceError,
    with nothing left reserved, where there is no autoscaler or it does not deliver.
    """
    bundle = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    bundle = {name: amount for name, amount in bundle.items() if amount}
    # Ray takes None for "with this job", although its annotation says str.
    group = placement_group([bundle] * num_workers, strategy="PACK", lifetime=lifetime)
    try:
        total = count_room(total_resources_per_node().values(), cluster)
        if total.num_workers >= num_workers and _placed_within(group, _SETTLE_S):
            return group
        _wait(group, num_workers, cluster, say, embedded=embedded)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def count_room(nodes: Iterable[Mapping[str, float]], cluster: ClusterConfig) -> Room:
    """How many workers fit into `nodes`, each a map from resource to amount."""
    num_workers = num_nodes = 0
    cpus = gpus = 0.0
    for node in nodes:
        num_nodes += 1
        cpus += node.get("CPU", 0.0)
        gpus += node.get("GPU", 0.0)
        asked = (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
        # Ray counts in 1/10000; the term keeps 0.3 / 0.1 at 3.
        num_workers += min(
            int(node.get(name, 0.0) / amount + 1e-6) for name, amount in asked if amount
        )
    return Room(num_workers=num_workers, num_nodes=num_nodes, cpus=cpus, gpus=gpus)


def fitting_layout(num_workers: int) -> str:
    """A layout of at most `num_workers` workers, in the run file's words."""
    if num_workers < 2:
        return "layout.pipeline 1 and layout.experts 1 with layout.schedule 1f1b"
    # Powers of two: they divide the usual numbers of experts.
    experts = 1 << ((num_workers // 2).bit_length() - 1)
    return f"layout.pipeline 2 and layout.experts {experts}"


def _wait(
    group: PlacementGroup,
    num_workers: int,
    cluster: ClusterConfig,
    say: Callable[[str], None],
    *,
    embedded: bool,
) -> None:
    started = time.monotonic()
    outlook = None if embedded else _first_outlook(group)
    if outlook is None or not outlook.active:
        raise _does_not_fit(num_workers, cluster, "no autoscaler brings nodes")
    asked = _asked(num_workers, cluster)
    say(f"waiting up to {cluster.wait_for_resources_s:g} s for the autoscaler to bring {asked}")
    said = ""
    while not _placed(group):
        waited = time.monotonic() - started
        if outlook is not None and outlook.hopeless and not _fits_when_idle(num_workers, cluster):
            raise _does_not_fit(
                num_workers, cluster, "the cluster's autoscaler has no nodes that would hold it"
            )
        if waited > cluster.wait_for_resources_s:
            raise _does_not_fit(
                num_workers,
                cluster,
                f"its autoscaler did not bring the nodes within cluster.wait_for_resources_s "
                f"({cluster.wait_for_resources_s:g} s)",
            )
        line = _progress(outlook, num_workers, cluster)
        if line != said:
            say(line)
            said = line
        time.sleep(_POLL_S)
        outlook = autoscaler.read(group.id.hex())
    say(f"the nodes have come: {asked} placed after {time.monotonic() - started:.0f} s")


def _first_outlook(group: PlacementGroup) -> autoscaler.Outlook | None:
    deadline = time.monotonic() + _FIRST_REPORT_S
    while (outlook := autoscaler.read(group.id.hex())) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return outlook


def _progress(outlook: autoscaler.Outlook | None, num_workers: int, cluster: ClusterConfig) -> str:
    room = count_room(_free(), cluster)
    line = (
        f"room for {room.num_workers} of {_many(num_workers, 'worker')} on "
        f"{_many(room.num_nodes, 'node')}"
    )
    if outlook is None or not outlook.coming:
        return line
    coming = ", ".join(f"{n} x {node_type}" for node_type, n in sorted(outlook.coming.items()))
    return f"{line}, starting: {coming}"


def _does_not_fit(num_workers: int, cluster: ClusterConfig, why: str) -> ResourceError:
    room = count_room(_free(), cluster)
    fits = (
        f"fits: {_many(room.num_workers, 'worker')}, e.g. {fitting_layout(room.num_workers)}"
        if room.num_workers
        else "no worker fits: add nodes, or lower cluster.cpus_per_worker or gpus_per_worker"
    )
    return ResourceError(
        f"the layout needs {_asked(num_workers, cluster)}, the cluster has "
        f"{_many(room.cpus, 'CPU')} and {_many(room.gpus, 'GPU')} free on "
        f"{_many(room.num_nodes, 'node')}, and {why}",
        hint=fits,
    )


def _asked(num_workers: int, cluster: ClusterConfig) -> str:
    each = (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker))
    parts = ", ".join(_many(amount, name) for name, amount in each if amount)
    return f"{_many(num_workers, 'worker')} x ({parts})"


def _many(amount: float, noun: str) -> str:
    return f"{amount:g} {noun}" if amount == 1 else f"{amount:g} {noun}s"


def _fits_when_idle(num_workers: int, cluster: ClusterConfig) -> bool:
    return count_room(total_resources_per_node().values(), cluster).num_workers >= num_workers


def _free() -> list[Mapping[str, float]]:
    return list(available_resources_per_node().values())


def _placed(group: PlacementGroup) -> bool:
    return placement_group_table(group)["state"] == "CREATED"


def _placed_within(group: PlacementGroup, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not (placed := _placed(group)) and time.monotonic() < deadline:
        time.sleep(_POLL_S / 10)
    return placed
