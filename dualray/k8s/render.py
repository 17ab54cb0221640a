"""A run as Kubernetes objects for the KubeRay operator (ray.io/v1, KubeRay 1.7). Pure.

head pod      no CPUs for Ray to give away; controller and engine, which ask for none, sit here
worker pods   one StageWorker each
Service       gRPC, to the head pod, where the engine is pinned. RayService cannot host us: it
              is ready only with a Ray Serve application
claim         /workspace in every pod: shards in, runs out
policy        who may come in: the run's own pods, the operator, gRPC and metrics
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import yaml

from dualray.k8s.deployment import (
    DASHBOARD_PORT,
    METRICS_PORT,
    RUN_FILE_DIR,
    RUN_LABEL,
    WORKSPACE,
    Deployment,
    Object,
    metadata,
    object_name,
)
from dualray.k8s.pods import cluster_spec, submitter_pod

Kind = Literal["rayjob", "raycluster"]


def render(deployment: Deployment, kind: Kind = "rayjob") -> list[Object]:
    """The objects in the order in which they are to be created."""
    objects = [_policy(deployment)]
    if deployment.kubernetes.claim is None:
        objects.append(_claim(deployment))
    if kind == "rayjob":
        objects += [_config_map(deployment), _ray_job(deployment)]
    else:
        objects.append(_ray_cluster(deployment))
    if deployment.grpc_port is not None:
        objects.append(_service(deployment, kind))
    return objects


def to_yaml(objects: Iterable[Object]) -> str:
    """A multi-document stream; text of several lines stays readable."""
    return yaml.dump_all(
        objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, allow_unicode=False
    )


class _Dumper(yaml.SafeDumper):
    """Block style for text with line ends; no anchors, which are hard on readers."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _ray_job(d: Deployment) -> Object:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(d),
        "spec": {
            # One plain command: the submitter's shell would take `cd X && Y` apart.
            "entrypoint": f"env -C {WORKSPACE} python -m dualray.platform.cli train "
            f"{RUN_FILE_DIR}/run.yaml --address auto",
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": submitter_pod(d),
            # A new cluster would begin anew; continuing is the run's own business.
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": d.kubernetes.keep_s,
            "rayClusterSpec": cluster_spec(d, mounts_run_file=True),
        },
    }


def _ray_cluster(d: Deployment) -> Object:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata(d),
        "spec": cluster_spec(d, mounts_run_file=False),
    }


def _config_map(d: Deployment) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(d, "-run"),
        "data": {"run.yaml": d.run_yaml},
    }


def _claim(d: Deployment) -> Object:
    spec: Object = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": d.kubernetes.storage}},
    }
    if d.kubernetes.storage_class is not None:
        spec["storageClassName"] = d.kubernetes.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": metadata(d, "-workspace"),
        "spec": spec,
    }


def _service(d: Deployment, kind: Kind) -> Object:
    selector = {RUN_LABEL: object_name(d.name), "ray.io/node-type": "head"}
    if kind == "raycluster":
        # A RayJob's cluster gets a name of its own, known only once it runs.
        selector["ray.io/cluster"] = object_name(d.name)
    port = {"name": "grpc", "port": d.grpc_port, "targetPort": d.grpc_port, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(d, "-grpc"),
        "spec": {
            "type": "ClusterIP",
            "selector": selector,
            "ports": [port | {"appProtocol": "kubernetes.io/h2c"}],
        },
    }


def _policy(d: Deployment) -> Object:
    run = {"matchLabels": {RUN_LABEL: object_name(d.name)}}
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    metrics_ports = [METRICS_PORT]
    if d.engine_metrics_port is not None:
        metrics_ports.append(d.engine_metrics_port)
    rules: list[Object] = [
        {"from": [{"podSelector": run}]},
        {
            "from": [{"namespaceSelector": {}, "podSelector": operator}],
            "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}],
        },
        {
            "from": [{"namespaceSelector": {}}],
            "ports": [{"protocol": "TCP", "port": port} for port in metrics_ports],
        },
    ]
    if d.grpc_port is not None:
        rules.append({"ports": [{"protocol": "TCP", "port": d.grpc_port}]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(d, "-ingress"),
        "spec": {"podSelector": run, "policyTypes": ["Ingress"], "ingress": rules},
    }
