"""Placement: what fits, what is said, and a real autoscaler that brings the nodes."""

import contextlib
import socket
import subprocess
import sys

import pytest
import ray
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import placement_group_table
from support.fake_cluster import FakeNodes, free_port, ray_head

from dualray.actors.autoscaler import Outlook, parse_v1, parse_v2
from dualray.actors.cluster import ClusterConfig, attach, connect
from dualray.actors.placement import count_room, fitting_layout, reserve
from dualray.errors import ConfigError, ResourceError, RunError

JOIN = """
import os, sys
from dualray.actors.cluster import attach
from dualray.errors import RunError
try:
    connection = attach(sys.argv[1], sys.argv[2] or None)
    import ray
    print("joined", ray.cluster_resources()["CPU"])
    connection.close()
    print("left", "RAY_AUTH_TOKEN" in os.environ)
except RunError as error:
    print(error)
"""


def placed_groups():
    return [g for g in placement_group_table().values() if g["state"] != "REMOVED"]


def test_room_is_counted_per_node():
    # 5 CPUs in all, but the odd ones do not add up to a worker.
    nodes = [{"CPU": 3.0}, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 8.0}, {}]
    room = count_room(nodes, ClusterConfig(cpus_per_worker=2))
    assert (room.num_workers, room.num_nodes, room.cpus, room.gpus) == (1, 4, 5.0, 8.0)
    assert count_room(nodes, ClusterConfig(gpus_per_worker=4)).num_workers == 1
    assert count_room(nodes, ClusterConfig(cpus_per_worker=0, gpus_per_worker=1)).num_workers == 8
    assert count_room([{"CPU": 0.3}], ClusterConfig(cpus_per_worker=0.1)).num_workers == 3


@pytest.mark.parametrize(
    ("num_workers", "pipeline", "experts"), [(2, 2, 1), (3, 2, 1), (4, 2, 2), (7, 2, 2), (9, 2, 4)]
)
def test_fitting_layout_fits(num_workers, pipeline, experts):
    assert pipeline * experts <= num_workers
    expected = f"layout.pipeline {pipeline} and layout.experts {experts}"
    assert fitting_layout(num_workers) == expected


def test_one_worker_has_no_dualpipe():
    assert fitting_layout(1).endswith("layout.schedule 1f1b")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"cpus_per_worker": -1},
            "cluster.cpus_per_worker is -1 and must be 0 or more; set cluster.cpus_per_worker to a "
            "number from 0 upwards.",
        ),
        (
            {"cpus_per_worker": 0},
            "cluster.cpus_per_worker and cluster.gpus_per_worker are both 0 and a worker must ask "
            "for something; set cluster.cpus_per_worker to 1.",
        ),
        (
            {"address": "http://head:8265"},
            "cluster.address is http://head:8265 and must be HOST:PORT or auto; use `dualray "
            "submit` for a dashboard address, or give HOST:6379 of the head.",
        ),
        (
            {"address": "head"},
            "cluster.address is head and must be HOST:PORT or auto; give HOST:PORT of the head "
            "(its port is 6379 by default), or auto.",
        ),
    ],
)
def test_bad_cluster_fields(fields, sentence):
    with pytest.raises(ConfigError) as caught:
        ClusterConfig(**fields)
    assert str(caught.value) == sentence


def test_an_address_where_nothing_answers():
    port = free_port()
    with pytest.raises(RunError) as caught:
        connect(ClusterConfig(address=f"127.0.0.1:{port}"), 1)
    assert str(caught.value) == (
        f"cluster.address is 127.0.0.1:{port} and no Ray head answers there; check the host, the "
        "port (6379 by default) and that the cluster is up."
    )
    assert not ray.is_initialized()


def test_an_address_where_something_else_listens(monkeypatch):
    monkeypatch.setattr("dualray.actors.cluster._PROBE_LIMIT_S", 0.5)
    # It accepts and stays silent; `ray.init` alone would try for minutes and end the process.
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RunError, match="no Ray head answers there"):
            connect(ClusterConfig(address=f"127.0.0.1:{other.getsockname()[1]}"), 1)


def v1_status(types, launches=None, pending=()):
    return {
        "time": 0,
        "autoscaler_report": {
            "pending_launches": launches or {},
            "pending_nodes": list(pending),
            "node_type_mapping": types,
        },
    }


def test_v1_reports():
    assert parse_v1({"time": 0, "monitor_pid": 7}) is None
    assert parse_v1(v1_status({"ab12": "node_ab12"})) == Outlook(active=False)
    assert parse_v1(v1_status({"10.0.0.1": "head"})) == Outlook(active=True)
    status = v1_status({"10.0.0.1": "head"}, {"gpu": 2}, [["10.0.0.2", "gpu", "setting-up"]])
    assert parse_v1(status) == Outlook(active=True, coming={"gpu": 3})


def test_v2_reports():
    reply = autoscaler_pb2.GetClusterStatusReply()
    assert parse_v2(reply, "ab") is None
    state = reply.autoscaling_state
    state.autoscaler_state_version = 1
    assert parse_v2(reply, "ab") == Outlook(active=True)
    state.infeasible_gang_resource_requests.add(details="ab:PACK|PENDING")
    assert parse_v2(reply, "ab") == Outlook(active=True, hopeless=True)
    assert parse_v2(reply, "cd") == Outlook(active=True)
    state.pending_instance_requests.add(ray_node_type_name="gpu", count=2)
    state.pending_instances.add(ray_node_type_name="gpu")
    assert parse_v2(reply, "ab") == Outlook(active=True, coming={"gpu": 3})


@pytest.mark.ray
def test_embedded_ray_asks_for_a_token_and_refuses_what_does_not_fit(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    said = []
    config = ClusterConfig(cpus_per_worker=0.5)
    with contextlib.closing(connect(config, 2)) as connection:
        assert connection.embedded
        reserve(2, config, said.append, embedded=True)
        with pytest.raises(ResourceError) as caught:
            reserve(2, ClusterConfig(gpus_per_worker=1), said.append, embedded=True)
        assert str(caught.value) == (
            "the layout needs 2 workers x (1 CPU, 1 GPU), the cluster has 2 CPUs and 0 GPUs "
            "free on 1 node, and no autoscaler brings nodes; no worker fits: add nodes, or lower "
            "cluster.cpus_per_worker or gpus_per_worker."
        )
        with pytest.raises(ResourceError, match=r"fits: 4 workers, e\.g\. layout\.pipeline 2 and"):
            reserve(7, config, said.append, embedded=True)
        assert said == []
        # An autoscaler that never delivers.
        outlook = Outlook(active=True, coming={"gpu": 1})
        monkeypatch.setattr("dualray.actors.autoscaler.read", lambda group_id: outlook)
        with pytest.raises(ResourceError, match=r"within cluster\.wait_for_resources_s \(0 s\);"):
            reserve(7, ClusterConfig(wait_for_resources_s=0), said.append)
        assert said == ["waiting up to 0 s for the autoscaler to bring 7 workers x (1 CPU)"]
        assert [len(g["bundles"]) for g in placed_groups()] == [2]
        environment = {"RAY_AUTH_MODE": "token", "PATH": "/usr/bin:/bin"}
        for token, answer in (
            (connection.auth_token, "joined 3.0\nleft False\n"),
            ("f" * 64, "refuses this process's token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ):
            command = [sys.executable, "-c", JOIN, connection.address, token]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=60, check=True
            )
            assert answer in done.stdout


@pytest.mark.ray
def test_without_an_autoscaler_a_run_that_does_not_fit_is_refused():
    with ray_head(num_cpus=3) as head:
        config = ClusterConfig(address=head.address, wait_for_resources_s=600)
        with contextlib.closing(connect(config, 4)) as connection:
            assert (connection.embedded, connection.address) == (False, head.address)
            with pytest.raises(ResourceError) as caught:
                reserve(4, config, print)
            assert placed_groups() == []
    assert str(caught.value) == (
        "the layout needs 4 workers x (1 CPU), the cluster has 3 CPUs and 0 GPUs free on 1 node, "
        "and no autoscaler brings nodes; fits: 3 workers, e.g. layout.pipeline 2 and "
        "layout.experts 1."
    )


@pytest.mark.ray
def test_an_autoscaler_brings_the_nodes():
    """The second generation; a whole run on the first is in tests/platform/test_submit.py."""
    said = []
    with ray_head(num_cpus=0, nodes=FakeNodes(num_cpus=2, max_workers=2, version=2)) as head:
        config = ClusterConfig(address=head.address, wait_for_resources_s=60)
        with contextlib.closing(attach(head.address)):
            group = reserve(3, config, said.append)
            nodes = placement_group_table(group)["bundles_to_node_id"]
            assert (len(nodes), len(set(nodes.values()))) == (3, 2)
            # More than it may ever start: it says so, long before the limit.
            with pytest.raises(ResourceError) as caught:
                reserve(8, config, print)
            assert len(placed_groups()) == 1
    assert said[0] == "waiting up to 60 s for the autoscaler to bring 3 workers x (1 CPU)"
    assert said[1].startswith("room for 0 of 3 workers on 1 node")
    assert any(" x worker" in line for line in said)
    assert said[-1].startswith("the nodes have come: 3 workers x (1 CPU) placed after ")
    assert str(caught.value) == (
        "the layout needs 8 workers x (1 CPU), the cluster has 1 CPU and 0 GPUs free on 3 nodes, "
        "and the cluster's autoscaler has no nodes that would hold it; fits: 1 worker, e.g. "
        "layout.pipeline 1 and layout.experts 1 with layout.schedule 1f1b."
    )
