"""What a run's Kubernetes objects say, in one place, and the names they go by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from dualray.errors import ConfigError
from dualray.k8s.config import KubernetesConfig

Object = dict[str, Any]

RUN_LABEL = "dualray/run"
"""Label of every object and pod of a run."""
WORKSPACE = "/workspace"
RUN_FILE_DIR = "/etc/dualray"
DASHBOARD_PORT = 8265
METRICS_PORT = 8080
"""Ray's own metrics."""

# KubeRay refuses RayJobs above 47 characters; ours also name a Service and a claim.
_MAX_NAME = 40


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """All that the objects say about a run."""

    name: str
    """The run's name; `object_name` makes it a DNS label."""
    run_yaml: str
    """The run file as the pods see it."""
    num_workers: int
    """The layout's world size."""
    cpus_per_worker: float
    gpus_per_worker: float
    grpc_port: int | None
    """None for a run that does not serve."""
    engine_metrics_port: int | None = None
    """None for a run whose engine has no metrics port."""
    engine_metrics_tls: bool = False
    """Whether that port speaks HTTPS."""
    drain_s: float = 30.0
    """Seconds that accepted requests get to end; pods live longer."""
    kubernetes: KubernetesConfig
    ray_version: str
    """Ray in the image: KubeRay chooses probes and authentication by it."""

    def __post_init__(self) -> None:
        if self.gpus_per_worker != int(self.gpus_per_worker):
            raise ConfigError(
                f"cluster.gpus_per_worker is {self.gpus_per_worker:g} and Kubernetes gives whole "
                "GPUs only",
                hint="set cluster.gpus_per_worker to a whole number",
            )
        if self.grpc_port == 0:
            raise ConfigError(
                "serve.port is 0 and a Service needs a port known beforehand",
                hint="set serve.port, say to 50051",
            )
        if self.engine_metrics_port in (0, DASHBOARD_PORT, METRICS_PORT):
            raise ConfigError(
                f"serve.metrics_port is {self.engine_metrics_port} and must be known beforehand "
                f"and none of Ray's own {DASHBOARD_PORT} and {METRICS_PORT} in the head pod",
                hint="set serve.metrics_port, say to 9400",
            )
        most = self.kubernetes.max_workers
        if self.kubernetes.autoscale and most is not None and most < self.num_workers:
            raise ConfigError(
                f"kubernetes.max_workers is {most} and the layout has {self.num_workers} workers, "
                "which must not exceed it",
                hint=f"set kubernetes.max_workers to {self.num_workers} or more",
            )


def object_name(run_name: str) -> str:
    """The run's name as a DNS label that may begin a Service's name. Raises ConfigError."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if name[:1].isdigit():
        name = f"run-{name}"
    if not name or len(name) > _MAX_NAME:
        raise ConfigError(
            f"name is {run_name!r}, {name!r} as a Kubernetes name, and must have 1 to "
            f"{_MAX_NAME} characters",
            hint="give the run a shorter name of letters, digits and '-'",
        )
    return name


def metadata(d: Deployment, suffix: str = "") -> Object:
    """Name, namespace and label of an object of the run."""
    name = object_name(d.name)
    return {
        "name": name + suffix,
        "namespace": d.kubernetes.namespace,
        "labels": {RUN_LABEL: name},
    }
