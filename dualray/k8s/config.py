"""What a run's Kubernetes objects need beyond its layout."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualray.errors import ConfigError

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_FIELDS_OF_QUANTITY = ("memory_per_worker", "head_memory", "shared_memory", "storage")


@dataclass(frozen=True, kw_only=True)
class KubernetesConfig:
    """The `kubernetes` section of a run file; `dualray k8s render` reads it."""

    namespace: str = "default"
    """Namespace of every object."""
    image: str = "dualray:latest"
    """Container image: Python, Ray and dualray, run by a user who is not root."""
    claim: str | None = None
    """Existing PersistentVolumeClaim mounted at /workspace in every pod, where the run looks for
    `data` and writes `runs`; ReadWriteMany where the pods sit on several nodes. None writes a
    claim of the run's own, which ends with its objects."""
    storage: str = "20Gi"
    """Size of the run's own claim."""
    storage_class: str | None = None
    """Storage class of the run's own claim; none takes the cluster's default."""
    memory_per_worker: str = "4Gi"
    """Memory each worker pod may use."""
    head_cpus: float = 2.0
    """CPUs of the head pod, which holds controller and engine."""
    head_memory: str = "8Gi"
    """Memory the head pod may use."""
    shared_memory: str = "2Gi"
    """Size of /dev/shm in every pod: Ray's object store and NCCL; it counts as memory."""
    autoscale: bool = False
    """Start with `min_workers` pods and let Ray's autoscaler bring the rest when they are asked
    for, and remove them when idle."""
    min_workers: int = 0
    """Worker pods that stay when idle, with `autoscale`."""
    max_workers: int | None = None
    """Worker pods the autoscaler may start; none is as many as the layout has workers."""
    idle_timeout_s: int = 60
    """Seconds after which the autoscaler removes an idle worker pod."""
    token_secret: str | None = None
    """Secret whose key `auth_token` is Ray's token; none lets KubeRay make one."""
    keep_s: int = 300
    """Seconds an ended job keeps its pods, for their logs. A run that serves after training has
    not ended."""

    def __post_init__(self) -> None:
        names = {
            "namespace": self.namespace,
            "claim": self.claim,
            "token_secret": self.token_secret,
        }
        for field, name in names.items():
            if name is not None and not _LABEL.fullmatch(name):
                raise ConfigError(
                    f"kubernetes.{field} is {name!r} and must be a DNS label (lower-case letters, "
                    "digits and '-', at most 63)",
                    hint=f"set kubernetes.{field} to the name of an existing object",
                )
        for field in _FIELDS_OF_QUANTITY:
            value = getattr(self, field)
            if not _QUANTITY.fullmatch(value):
                raise ConfigError(
                    f"kubernetes.{field} is {value!r} and must be a quantity",
                    hint="write, say, 4Gi",
                )
        if not self.image or self.image != self.image.strip():
            raise ConfigError(
                f"kubernetes.image is {self.image!r} and must name an image",
                hint="write REGISTRY/NAME:TAG",
            )
        if self.head_cpus <= 0:
            raise ConfigError(
                f"kubernetes.head_cpus is {self.head_cpus:g} and must be above 0",
                hint="set kubernetes.head_cpus to 1 or more",
            )
        for field in ("min_workers", "max_workers", "idle_timeout_s", "keep_s"):
            value = getattr(self, field)
            if value is not None and value < 0:
                raise ConfigError(
                    f"kubernetes.{field} is {value} and must be 0 or more",
                    hint=f"set kubernetes.{field} to 0 or more",
                )
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ConfigError(
                f"kubernetes.max_workers is {self.max_workers} and kubernetes.min_workers is "
                f"{self.min_workers}, which must not exceed it",
                hint="raise kubernetes.max_workers",
            )
