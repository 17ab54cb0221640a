"""A real Ray head for tests, apart from every other Ray on the machine.

`ray_head(...)` runs `ray start --head` with its own temporary folder and free ports, and ends
exactly the processes it started, by id; `ray stop` would end every Ray of the machine. With
`nodes`, the head runs Ray's real autoscaler over the fake multi-node provider, whose "nodes" are
raylets on this machine. (`ray.cluster_utils.AutoscalingCluster` wants a file the wheel does not
carry, and calls `ray stop`.)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_LIMIT_S = 90
_HEAD_NODE_ID = "f" * 51 + "00000"  # what the fake provider calls its head


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running head: where drivers (`address`) and the jobs client (`dashboard`) reach it."""

    address: str
    dashboard: str
    temp_dir: Path


@dataclass(frozen=True, kw_only=True)
class FakeNodes:
    """What the autoscaler may start: up to `max_workers` raylets of `num_cpus` CPUs each."""

    num_cpus: int
    max_workers: int
    version: int = 1
    """The autoscaler's generation, 1 or 2."""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def ray_head(
    *,
    num_cpus: int,
    nodes: FakeNodes | None = None,
    dashboard: bool = False,
    env: dict[str, str] | None = None,
) -> Iterator[Head]:
    """Start a head, yield it, and end all that descended from it."""
    # Not pytest's tmp_path: the sockets inside must stay under 108 characters.
    temp_dir = Path(tempfile.mkdtemp(prefix="dr-", dir="/tmp"))
    host, port, dashboard_port = _host(), free_port(), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--node-ip-address={host}", f"--port={port}", f"--temp-dir={temp_dir}"),
        *(f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={100 << 20}"),
        *(f"--ray-client-server-port={free_port()}", "--dashboard-agent-listen-port=0"),
        *(f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"),
        "--disable-usage-stats",
    ]
    full_env = _environment(nodes) | (env or {})
    if nodes:
        config = temp_dir / "autoscaling.yaml"
        config.write_text(json.dumps(_autoscaling(nodes, f"{host}:{port}", num_cpus)))
        command.append(f"--autoscaling-config={config}")
    log = temp_dir / "start.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=full_env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        _await_port(process, host, dashboard_port if dashboard else port, log)
        _await_line(process, "Ray runtime started", log)
        yield Head(
            address=f"{host}:{port}",
            dashboard=f"http://127.0.0.1:{dashboard_port}",
            temp_dir=temp_dir,
        )
    finally:
        _end(process)
        shutil.rmtree(temp_dir, ignore_errors=True)


def _host() -> str:
    import ray

    return ray.util.get_node_ip_address()


def _environment(nodes: FakeNodes | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    kept |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    kept["AUTOSCALER_UPDATE_INTERVAL_S"] = "1"  # instead of 5, also where it only mirrors
    if nodes:
        kept["RAY_FAKE_CLUSTER"] = "1"
        if nodes.version == 2:
            kept |= {
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": _HEAD_NODE_ID,
                "RAY_NODE_TYPE_NAME": "ray.head.default",
            }
    return kept


def _autoscaling(nodes: FakeNodes, gcs_address: str, head_cpus: int) -> dict[str, Any]:
    # Every key is needed: the monitor indexes them and dies, in monitor.err only, without one.
    return {
        "cluster_name": "fake",
        "max_workers": nodes.max_workers,
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs_address,
            "head_node_id": _HEAD_NODE_ID,
            "launch_multiple": nodes.version == 2,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "docker": {},
        "available_node_types": {
            "ray.head.default": {
                "resources": {"CPU": head_cpus},
                "node_config": {},
                "max_workers": 0,
            },
            "worker": {
                "resources": {"CPU": nodes.num_cpus, "object_store_memory": 100 << 20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes.max_workers,
            },
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def _await_port(process: subprocess.Popen[bytes], host: str, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        for address in (host, "127.0.0.1"):
            with contextlib.suppress(OSError), socket.create_connection((address, port), 1):
                return
        time.sleep(0.1)
    raise AssertionError(f"the head did not open port {port}:\n{log.read_text()}")


def _await_line(process: subprocess.Popen[bytes], line: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if line in log.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"the head did not say {line!r}:\n{log.read_text()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the head and its descendants. They are listed first: a dead parent names no children."""
    try:
        family = [
            psutil.Process(process.pid),
            *psutil.Process(process.pid).children(recursive=True),
        ]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=20)
    process.wait()
