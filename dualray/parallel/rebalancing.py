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
from dualray.parallel.move_rate import MoveRate
from dualray.parallel.nodes import NodeMap
from dualray.parallel.proposal import Proposal
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.speed_fit import RankTimes
from dualray.parallel.speed_history import SpeedHistory, checked
from dualray.schedule.actions import Schedule

_ROWS_PER_S = 1e5
"""What a rank is taken to do while none was measured, which is only before its first row."""
_LEAST_STEPS = 2
"""That must have been seen before a look, if looks are not more frequent than that."""


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
        self._looked: int | None = None
        self._seen = 0
        self._speeds = SpeedHistory()
        self._balancer = Balancer(
            slots=placement.slots(next(iter(placement.held))),
            nodes=nodes.node_of if nodes is not None else (0,) * layout.experts,
            num_groups=model.n_group if nodes is not None else 1,
            decay=config.load_decay,
            min_gain=config.min_gain,
        )
        self._numel = 3 * model.hidden_size * model.moe_intermediate_size
        self._dtype = dtype
        self._rate = MoveRate(config.link_bytes_per_s)

    def saw(
        self, works: Sequence[ExpertWork], *, step: int, steps: int = 1, left: int | None = None
    ) -> Proposal | None:
        """So many steps are done, the last of them number `step`, counted from 1; `works` is what
        each worker did in them, by world rank. `left` are those that are still to come, if that
        is known.

        It is time for a look when `step` is a multiple of `every` or has passed one, whenever this
        began to see steps: a run that is resumed again and again looks too. Raises RunError for
        loads or seconds that cannot be; nothing of the steps is taken in then.
        """
        loads = loads_of(self.placement, self._layout, works)
        per_step = {layer: load / steps for layer, load in loads.items()}
        times = checked(times_of(self._layout, sorted(self.placement.held), works, steps=steps))
        self._balancer.observe(per_step)
        self._speeds.observe(times)
        if self._looked is None:
            self._looked = step - steps
        self._seen += steps
        if step // self.every == self._looked // self.every:
            return None
        if self._seen < min(_LEAST_STEPS, self.every):
            return None
        self._looked = step
        self._balancer.observe({}, self._speeds.rows_per_s())
        horizon = Horizon(
            steps=self.every if left is None else min(self.every, left),
            passes=TRAINING_PASSES if self._trains else SERVING_PASSES,
            sharers=self._sharers,
            cost=self._cost(),
        )
        return self._balancer.consider(self.placement, horizon, rows_per_s=_ROWS_PER_S)

    def moved(self, placement: ExpertPlacement, results: Sequence[Moved]) -> None:
        """Experts live there now; what that took is foreseen for the next time."""
        self.placement = placement
        self._speeds.moved()
        self._rate.observe(
            max(result.received_bytes for result in results),
            max(result.seconds for result in results),
        )

    def _cost(self) -> MoveCost:
        """Of one expert of one layer; masters and moments as AdamW keeps them."""
        itemsize = self._dtype.itemsize
        moments = 2 * max(itemsize, 4)
        masters = 4 if itemsize < 4 else 0
        overhead_s, bytes_per_s = self._rate.fit()
        return MoveCost(
            weight_bytes=self._numel * itemsize,
            state_bytes=self._numel * (moments + masters) if self._has_state else 0,
            sharers=self._sharers,
            bytes_per_s=bytes_per_s,
            overhead_s=overhead_s,
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


def times_of(
    layout: Layout, layers: Sequence[int], works: Sequence[ExpertWork], *, steps: int = 1
) -> RankTimes:
    """Rows and seconds of every expert rank in these layers, a step, as means over the workers
    that were measured."""
    number = {layer: place for place, layer in enumerate(layers)}
    sum_XLR = np.zeros((3, len(layers), layout.experts))
    for rank, work in enumerate(works):
        held_by = layout.coordinate(rank).expert
        for layer, rows in work.slot_rows.items():
            took_s = work.seconds.get(layer, 0.0)
            if sum(rows) and took_s:
                sum_XLR[:, number[layer], held_by] += sum(rows), took_s, steps
    rows_LR, seconds_LR, number_LR = sum_XLR
    number_LR = np.maximum(number_LR, 1)
    return RankTimes(rows_LR=rows_LR / number_LR, seconds_LR=seconds_LR / number_LR)


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
