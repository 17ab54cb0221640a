"""The dispatch of a group of expert ranks: flat within a node."""

from __future__ import annotations

import torch
from torch import Tensor

from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import Ways
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
) -> AllToAllDispatch:
    """Dispatch over the expert ranks of `ways`, of which `nodes` knows who is on which node.

    `exchange` carries the rows; a worker's dispatches share one. `rows[layer]` counts, if it is
    given, what the slots of this rank were sent.
    """
    return AllToAllDispatch(placement, ways, device, exchange, rows)
