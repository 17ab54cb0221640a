"""The dispatch of a group of expert ranks: flat where they are on one node, else node by node."""

from __future__ import annotations

import torch
from torch import Tensor

from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
from dualray.parallel.node_dispatch import NodeLimitedDispatch
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement


def make_dispatch(
    placement: ExpertPlacement,
    ways: Ways,
    device: torch.device,
    exchange: Exchange,
    *,
    rows: dict[int, Tensor] | None = None,
    nodes: NodeMap | None = None,
    fp8: bool = False,
) -> AllToAllDispatch | NodeLimitedDispatch:
    """Dispatch over the expert ranks of `ways`; without `nodes` they count as one node.

    `exchange` carries the rows; a worker's dispatches share one. `rows[layer]` counts, if it is
    given, what the slots of this rank were sent. `fp8` sends rows to experts, and gradients on
    their way to them, in FP8 (arXiv 2412.19437, section 3.3.3).
    """
    is_flat = nodes is None or nodes.num_nodes == 1
    if is_flat and not fp8:
        return AllToAllDispatch(placement, ways, device, exchange, rows)
    if nodes is None:
        nodes = NodeMap(node_of=(0,) * ways.rows.size())
    return NodeLimitedDispatch(placement, ways, device, exchange, rows, nodes=nodes, fp8=fp8)
