"""Machines to plan for: the YAML files in profiles/, and clusters of them.

A file holds what a data sheet or a published measurement says about one GPU and its node, each
figure with its source. How much of it kernels reach is in kernels.py.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from importlib import resources

import yaml
from pydantic import TypeAdapter

from dualray.errors import ConfigError

_FOLDER = resources.files("dualray.platform.planning") / "profiles"
_SPEC = re.compile(r"([a-z0-9]+)x(-?[0-9]+)")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and how it is connected."""

    name: str
    """The file's name."""
    title: str
    """The product's name."""
    memory_bytes: int
    """Memory of one GPU."""
    num_sms: int
    """Streaming multiprocessors."""
    bf16_flops_per_s: float
    """Dense peak of BF16 matrix products."""
    fp32_flops_per_s: float
    """Peak of FP32 products as torch computes them by default, without tensor cores."""
    fp8_flops_per_s: float
    """Dense peak of FP8 matrix products."""
    sustained_clock: float
    """Clock under lasting load over the clock of short benchmarks, 0 to 1: the power limit."""
    attention_forward_flops_per_s: float
    """Rate of a causal BF16 attention kernel."""
    attention_backward_flops_per_s: float
    """Rate of its backward."""
    hbm_bytes_per_s: float
    """Peak bandwidth of the GPU's memory."""
    nvlink_bytes_per_s: float
    """What exchanges reach between the GPUs of a node, each way."""
    network_bytes_per_s: float
    """What exchanges reach between nodes, each way and for one GPU."""
    gpus_per_node: int
    """GPUs of one node."""
    dollars_per_gpu_hour: float
    """Rent of one GPU."""
    sources: dict[str, str] = field(hash=False)
    """Where a figure is from, by field."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many GPUs of one kind."""

    hardware: Hardware
    num_gpus: int

    @property
    def spec(self) -> str:
        """As `--cluster` takes it."""
        return f"{self.hardware.name}x{self.num_gpus}"


def hardware_names() -> list[str]:
    """Every profile, in alphabetical order."""
    names = (path.name for path in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_hardware(name: str) -> Hardware:
    """A profile by its name, which must be one of `hardware_names()`."""
    values = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(Hardware).validate_python({"name": name, **values})


def parse_cluster(spec: str) -> Cluster:
    """`PROFILExGPUS` as a cluster. Raises ConfigError naming --cluster."""
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ConfigError(
            f"--cluster is {spec} and must be PROFILExGPUS with one of the profiles "
            f"{', '.join(hardware_names())}",
            hint="try --cluster h800x2048",
        )
    name, num_gpus = match[1], int(match[2])
    if name not in hardware_names():
        close = difflib.get_close_matches(name, hardware_names(), n=1, cutoff=0.5)
        raise ConfigError(
            f"--cluster is {spec} and its profile {name} must be one of "
            f"{', '.join(hardware_names())}",
            hint=f"did you mean {close[0]}x{num_gpus}?" if close else f"try h800x{num_gpus}",
        )
    hardware = load_hardware(name)
    node = hardware.gpus_per_node
    if num_gpus < node:
        raise ConfigError(
            f"--cluster is {spec} and must have at least one node of {node} GPUs",
            hint=f"try --cluster {name}x{node}",
        )
    if num_gpus % node:
        below = num_gpus - num_gpus % node
        raise ConfigError(
            f"--cluster is {spec} and its {num_gpus} GPUs are no multiple of the {node} GPUs of a "
            "node",
            hint=f"try --cluster {name}x{below} or {name}x{below + node}",
        )
    return Cluster(hardware=hardware, num_gpus=num_gpus)
