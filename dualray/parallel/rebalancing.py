"""The loop that keeps experts evenly loaded: what workers did in, a new placement out.

Training and serving hold one of it each. It never sees a tensor: workers say how many rows their
slots were sent and how long that took, and are told where experts live from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dualray.model.config import ModelConfig
from dualray.parallel.balancer import SERVING_PASSES, TRAINING_PASSES, Balancer, Horizon
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.expert_moves import MoveCost
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout, holders
from dualray.parallel.nodes import NodeMap
from dualray.parallel.proposal import Proposal
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.speed_fit import fit_speeds
from dualray.schedule.actions import Schedule

_ROWS_PER_S = 1e5
"""What a rank is taken to do while none was measured, which is only before its first row."""


class Rebalancing:
    """Looks at the loads every so many steps. Plain data: it can be sent to another process."""

    def __init__(
        self,
        config: ExpertsConfig,
        model: ModelConfig,
        layout: Layout,
        schedule: Schedule,
        placement: ExpertPlacement,
        *,
        nodes: NodeMap | None,
        dtype: torch.dtype,
        trains: bool,
        has_state: bool,
    ) -> None:
        """`nodes` is where expert ranks are, if that matters; `dtype` is that of the weights. With
        `has_state` workers hold masters and moments, as they do behind their training too."""
        self.placement = placement
        self._layout, self._trains, self._has_state = layout, trains, has_state
        self.every = config.rebalance_every if trains else config.serve_rebalance_every
        """Steps between looks."""
        self._sharers = layout.replicas * len(holders(layout, schedule, 0))
        self._steps = 0
        self._balancer = Balancer(
            slots=placement.slots(next(iter(placement.held))),
            nodes=nodes.node_of if nodes is not None else (0,) * layout.experts,
            num_groups=model.n_group if nodes is not None else 1,
            decay=config.load_decay,
            min_gain=config.min_gain,
        )
        self._numel = 3 * model.hidden_size * model.moe_intermediate_size
        self._dtype = dtype
        self._bytes_per_s = config.link_bytes_per_s

    def saw(self, works: Sequence[ExpertWork], *, steps: int = 1) -> Proposal | None:
        """So many steps are done; `works` is what each worker did in them, by world rank.

        Perhaps it is time for a look. Raises RunError for loads or speeds that cannot be; nothing
        of the steps is taken in then.
        """
        loads = loads_of(self.placement, self._layout, works)
        per_step = {layer: load / steps for layer, load in loads.items()}
        self._balancer.observe(per_step, rows_per_s_of(self._layout, works))
        self._steps += steps
        if self._steps < self.every:
            return None
        self._steps = 0
        horizon = Horizon(
            steps=self.every,
            passes=TRAINING_PASSES if self._trains else SERVING_PASSES,
            sharers=self._sharers,
            cost=self._cost(),
        )
        return self._balancer.consider(self.placement, horizon, rows_per_s=_ROWS_PER_S)

    def moved(self, placement: ExpertPlacement, results: Sequence[Moved]) -> None:
        """Experts live there now; what that took is foreseen for the next time."""
        self.placement = placement
        seconds = max(result.seconds for result in results)
        most = max(result.received_bytes for result in results)
        if most and seconds > 0:
            self._bytes_per_s = most / seconds

    def _cost(self) -> MoveCost:
        """Of one expert of one layer; masters and moments as AdamW keeps them."""
        itemsize = self._dtype.itemsize
        moments = 2 * max(itemsize, 4)
        masters = 4 if itemsize < 4 else 0
        return MoveCost(
            weight_bytes=self._numel * itemsize,
            state_bytes=self._numel * (moments + masters) if self._has_state else 0,
            bytes_per_s=self._bytes_per_s,
        )


def loads_of(
    placement: ExpertPlacement, layout: Layout, works: Sequence[ExpertWork]
) -> dict[int, np.ndarray]:
    """Tokens per logical expert [E] int64 by layer, over all workers; by world rank in `works`."""
    loads: dict[int, np.ndarray] = {}
    for rank, work in enumerate(works):
        held_by = layout.coordinate(rank).expert
        for layer, rows in work.slot_rows.items():
            experts = placement.held[layer][held_by]
            load = loads.setdefault(layer, np.zeros(len(placement.home_ranks(layer)), np.int64))
            np.add.at(load, list(experts), rows)
    return loads


def rows_per_s_of(layout: Layout, works: Sequence[ExpertWork]) -> list[float | None]:
    """Rows a second of every expert rank in forwards; None where no row came or none was timed."""
    measured: list[list[tuple[float, float]]] = [[] for _ in range(layout.experts)]
    for rank, work in enumerate(works):
        measured[layout.coordinate(rank).expert] += [
            (sum(rows), work.seconds.get(layer, 0.0)) for layer, rows in work.slot_rows.items()
        ]
    return fit_speeds(measured)


def rank_imbalance(layout: Layout, works: Sequence[ExpertWork]) -> dict[int, float]:
    """By layer: rows of the fullest expert rank over the mean; 1.0 is balance."""
    rows: dict[int, list[int]] = {}
    for rank, work in enumerate(works):
        for layer, counts in work.slot_rows.items():
            of_ranks = rows.setdefault(layer, [0] * layout.experts)
            of_ranks[layout.coordinate(rank).expert] += sum(counts)
    return {
        layer: max(counts) * len(counts) / sum(counts)
        for layer, counts in sorted(rows.items())
        if sum(counts)
    }
