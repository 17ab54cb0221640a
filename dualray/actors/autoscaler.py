"""What the cluster's autoscaler says: is there one, what is on the way, can it help at all.

Ray runs a monitor on every head. Without an autoscaling configuration it only mirrors the nodes it
sees, and looks nearly like a working autoscaler from outside. The two generations differ:

- version 1 writes JSON under `__autoscaling_status`. A mirroring monitor calls every node's type
  `node_<its id>`; a real one uses the configuration's names.
- version 2 reports to the head. A mirroring one never tells itself from a real one, but both say
  which placement groups no configuration of nodes could ever hold: for a mirror that is each
  group that does not fit.

Parsing is pure; only `read` asks the head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.autoscaler.v2.sdk import GcsClient
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get

_STATUS_KEY = b"__autoscaling_status"
_READ_LIMIT_S = 5


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One report of the autoscaler."""

    active: bool
    """False where the monitor only mirrors nodes that people started."""
    coming: dict[str, int] = field(default_factory=dict)
    """Nodes on the way, by node type."""
    hopeless: bool = False
    """True where it says that no node it may start would make the group fit."""


def read(group_id: str) -> Outlook | None:
    """The latest report on the placement group (hex id); None while there is none."""
    status = _internal_kv_get(_STATUS_KEY)
    if status:
        return parse_v1(json.loads(status))
    head = ray.get_runtime_context().gcs_address
    # pyrefly: ignore [missing-attribute]  (Ray ships no stubs for its messages)
    reply = autoscaler_pb2.GetClusterStatusReply()
    reply.ParseFromString(GcsClient(head).get_cluster_status(timeout_s=_READ_LIMIT_S))
    return parse_v2(reply, group_id)


def parse_v1(status: dict[str, Any]) -> Outlook | None:
    """The status of the first generation; None before its first look at the nodes."""
    report = status.get("autoscaler_report")
    if report is None:
        return None
    coming: dict[str, int] = dict(report["pending_launches"])
    for _address, node_type, _state in report["pending_nodes"]:
        coming[node_type] = coming.get(node_type, 0) + 1
    types = report["node_type_mapping"] or {}
    return Outlook(active=any(t != f"node_{n}" for n, t in types.items()), coming=coming)


def parse_v2(reply: Any, group_id: str) -> Outlook | None:
    """The second generation's GetClusterStatusReply; None before its first round."""
    state = reply.autoscaling_state
    if state.autoscaler_state_version == 0:
        return None
    coming: dict[str, int] = {}
    for request in state.pending_instance_requests:
        coming[request.ray_node_type_name] = (
            coming.get(request.ray_node_type_name, 0) + request.count
        )
    for instance in state.pending_instances:
        coming[instance.ray_node_type_name] = coming.get(instance.ray_node_type_name, 0) + 1
    refused = any(
        gang.details.startswith(f"{group_id}:") for gang in state.infeasible_gang_resource_requests
    )
    return Outlook(active=True, coming=coming, hopeless=refused and not coming)
