"""Auxiliary-loss-free balancing: router biases follow the load of the whole global batch.

arXiv 2412.19437, section 2.1.2; imbalance as MaxVio, arXiv 2408.15664. L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.model.router import Router
from dualray.parallel.groups import Group


def global_loads(loads: dict[int, Tensor], group: Group | None) -> dict[int, Tensor]:
    """Sum int64 tokens per expert over every worker that ran these layers.

    `group` holds the copies of the layers' dense parameters, and so every worker whose
    tokens passed them; None when this process is alone.
    """
    if not loads:
        return {}
    layers = sorted(loads)
    stacked_LE = torch.stack([loads[layer] for layer in layers])
    if group is not None:
        dist.all_reduce(stacked_LE, group=group)
    return dict(zip(layers, stacked_LE))


def max_violation(load_E: Tensor) -> float:
    """MaxVio: the fullest expert's load over the mean load, minus one."""
    total = int(load_E.sum())
    return float(load_E.max()) * load_E.numel() / total - 1.0 if total else 0.0


@torch.no_grad()
def update_biases(routers: Iterable[Router], loads: dict[int, Tensor], gamma: float) -> None:
    """Lower the bias of overloaded experts by gamma, raise that of underloaded ones.

    Loads are compared exactly, as integers; an expert at the mean does not move.
    """
    if gamma == 0.0:
        return
    for router in routers:
        load_E = loads[router.layer]
        excess_E = load_E * load_E.numel() - load_E.sum()
        router.e_score_correction_bias.sub_(gamma * excess_E.sign())
