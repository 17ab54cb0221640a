"""The Ray cluster of a run: one head pod, one worker pod for each worker.

The pods keep to the `restricted` Pod Security Standard and a read-only root file system; what
must be written goes to /tmp, /dev/shm and the workspace.
"""

from __future__ import annotations

import math

from dualray.k8s.config import KubernetesConfig
from dualray.k8s.deployment import (
    DASHBOARD_PORT,
    METRICS_PORT,
    RUN_FILE_DIR,
    RUN_LABEL,
    WORKSPACE,
    Deployment,
    Object,
    object_name,
)

_USER_ID = 1000
_CHECKPOINT_S = 60
"""For the present step and a committed checkpoint."""
_MORE_S = 30
"""That a pod lives on when Ray has had its time, for processes that end."""


def cluster_spec(d: Deployment, *, mounts_run_file: bool) -> Object:
    """The RayCluster's spec, alone or within a RayJob."""
    k = d.kubernetes
    auth = {"mode": "token"} | ({"secretName": k.token_secret} if k.token_secret else {})
    spec: Object = {"rayVersion": d.ray_version, "authOptions": auth}
    if k.autoscale:
        spec |= {"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler(k)}
    spec["headGroupSpec"] = {
        # Workers belong into worker pods.
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _pod(d, head=True, mounts_run_file=mounts_run_file),
    }
    group: Object = {
        "groupName": "workers",
        "replicas": k.min_workers if k.autoscale else d.num_workers,
        "minReplicas": k.min_workers if k.autoscale else d.num_workers,
        "maxReplicas": (k.max_workers or d.num_workers) if k.autoscale else d.num_workers,
        "rayStartParams": {},
        "template": _pod(d, head=False, mounts_run_file=mounts_run_file),
    }
    if k.autoscale:
        group["idleTimeoutSeconds"] = k.idle_timeout_s
    spec["workerGroupSpecs"] = [group]
    return spec


def _autoscaler(k: KubernetesConfig) -> Object:
    return {
        "version": "v2",
        "idleTimeoutSeconds": k.idle_timeout_s,
        "resources": _resources("500m", "512Mi"),
        "securityContext": _container_security(),
        "env": [{"name": "HOME", "value": "/tmp"}],
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }


def _pod(d: Deployment, *, head: bool, mounts_run_file: bool) -> Object:
    k = d.kubernetes
    mounts = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "workspace", "mountPath": WORKSPACE},
    ]
    claim = k.claim or object_name(d.name) + "-workspace"
    volumes: list[Object] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": k.shared_memory}},
        {"name": "workspace", "persistentVolumeClaim": {"claimName": claim}},
    ]
    if mounts_run_file:
        mounts.append({"name": "run-file", "mountPath": RUN_FILE_DIR})
        config_map = {"name": object_name(d.name) + "-run"}
        volumes.append({"name": "run-file", "configMap": config_map})
    container: Object = {
        "name": "ray-head" if head else "ray-worker",
        "image": k.image,
        "workingDir": WORKSPACE,
        "env": _environment(d, head=head),
        "resources": _head_resources(k) if head else _worker_resources(d),
        "securityContext": _container_security(),
        "volumeMounts": mounts,
    }
    if head:
        container["ports"] = _head_ports(d)
    spec: Object = {
        # What the second autoscaler asks for; KubeRay replaces pods itself.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _ending_s(d) + _MORE_S,
        "enableServiceLinks": False,
        # The autoscaler is a container of the head pod and speaks to the API server.
        "automountServiceAccountToken": head and k.autoscale,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": volumes,
    }
    if not head and d.gpus_per_worker:
        spec["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    meta: Object = {"labels": {RUN_LABEL: object_name(d.name)}}
    if head and d.engine_metrics_port is not None:
        # Read by the scrape configuration that Prometheus' Helm chart comes with.
        meta["annotations"] = {
            "prometheus.io/scrape": "true",
            "prometheus.io/scheme": "https" if d.engine_metrics_tls else "http",
            "prometheus.io/path": "/metrics",
            "prometheus.io/port": str(d.engine_metrics_port),
        }
    return {"metadata": meta, "spec": spec}


def _head_ports(d: Deployment) -> list[Object]:
    ports = {"gcs-server": 6379, "dashboard": DASHBOARD_PORT, "client": 10001}
    ports["metrics"] = METRICS_PORT
    if d.grpc_port is not None:
        ports["grpc"] = d.grpc_port
    if d.engine_metrics_port is not None:
        ports["engine-metrics"] = d.engine_metrics_port
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _ending_s(d: Deployment) -> int:
    """Between SIGTERM and the end: accepted requests, and a committed checkpoint."""
    return math.ceil(d.drain_s) + _CHECKPOINT_S


def _environment(d: Deployment, *, head: bool) -> list[Object]:
    values = {
        "HOME": "/tmp",
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_ending_s(d)),
    }
    if head:
        values["RAY_JOB_STOP_WAIT_TIME_S"] = str(_ending_s(d))
    return [{"name": name, "value": value} for name, value in values.items()]


def _head_resources(k: KubernetesConfig) -> Object:
    return _resources(f"{k.head_cpus:g}", k.head_memory)


def _worker_resources(d: Deployment) -> Object:
    # Ray counts whole CPUs of a pod, and one worker goes into each.
    cpus = max(1, math.ceil(d.cpus_per_worker))
    resources = _resources(str(cpus), d.kubernetes.memory_per_worker)
    if d.gpus_per_worker:
        for part in resources.values():
            part["nvidia.com/gpu"] = str(int(d.gpus_per_worker))
    return resources


def _resources(cpu: str, memory: str) -> Object:
    """Requests equal to limits, so that no neighbour slows a worker that all others wait for."""
    return {part: {"cpu": cpu, "memory": memory} for part in ("requests", "limits")}


def submitter_pod(d: Deployment) -> Object:
    """The pod template of the Kubernetes Job that hands a RayJob to its cluster."""
    container = {
        "name": "submitter",
        "image": d.kubernetes.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": _resources("500m", "512Mi"),
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "metadata": {"labels": {RUN_LABEL: object_name(d.name)}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": _pod_security(),
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


def _pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "fsGroup": _USER_ID,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
