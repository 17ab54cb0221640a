"""How a training run scales: the fastest layout on more and more GPUs of one kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualray.platform.planning.estimate import Estimate
from dualray.platform.planning.layouts import rank
from dualray.platform.planning.setting import Setting

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The fastest layout on one size of cluster; None where none fits."""

    num_gpus: int
    estimate: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Two ways to use more GPUs."""

    same_batch: tuple[Point, ...]
    """Steps of the setting's batch: the same optimizer steps, each on fewer tokens a GPU."""
    grown_batch: tuple[Point, ...]
    """Steps of as many tokens a GPU as in the setting."""


def make_scale(setting: Setting) -> Scale:
    """Curves over `SIZES`."""
    return Scale(
        same_batch=tuple(_point(setting, size, setting.num_sequences) for size in SIZES),
        grown_batch=tuple(
            _point(setting, size, setting.num_sequences * size // setting.cluster.num_gpus)
            for size in SIZES
        ),
    )


def _point(setting: Setting, num_gpus: int, num_sequences: int) -> Point:
    cluster = replace(setting.cluster, num_gpus=num_gpus)
    found = rank(replace(setting, cluster=cluster, num_sequences=num_sequences), 1)
    return Point(num_gpus=num_gpus, estimate=next(iter(found.estimates), None))
