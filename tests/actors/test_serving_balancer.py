"""Between which of an engine's steps the balancer looks, and what it tells the workers then."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import torch
from support.models import tiny_config

from dualray.actors.balancer import ServingBalancer
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.rebalancing import Rebalancing
from dualray.schedule.make import make_schedule

MODEL = tiny_config(n_routed_experts=8, num_experts_per_tok=2, n_group=1, topk_group=1)
LAYOUT = Layout(pipeline=1, experts=2, schedule="1f1b")
CONFIG = ExpertsConfig(redundant=2, serve_rebalance_every=3, link_bytes_per_s=1e15)


class Worker:
    """What a worker is to the balancer: it says what its slots were sent, and moves experts."""

    def __init__(self, hot: float) -> None:
        self.rows, self.asked, self.placements = (
            [100, int(300 * hot), int(300 * hot), 100, 0],
            0,
            [],
        )
        self.expert_work = SimpleNamespace(remote=self._work)
        self.move_experts = SimpleNamespace(remote=self._move)

    async def _work(self) -> ExpertWork:
        self.asked += 1
        layers = MODEL.moe_layers
        return ExpertWork(
            slot_rows=dict.fromkeys(layers, self.rows),
            seconds=dict.fromkeys(layers, sum(self.rows) / 1e3),
        )

    async def _move(self, placement: Any) -> Moved:
        self.placements.append(placement)
        return Moved(layers=MODEL.moe_layers, received_bytes=100, seconds=0.25)


def test_it_looks_every_so_many_steps_and_moves_experts_on_all_workers() -> None:
    workers = [Worker(hot=4.0), Worker(hot=1.0)]
    rebalancing = Rebalancing(
        CONFIG, MODEL, LAYOUT, make_schedule("1f1b", 1, 1), CONFIG.first_placement(MODEL, LAYOUT),
        nodes=None, dtype=torch.float32, trains=False, has_state=False,
    )  # fmt: skip
    balancer = ServingBalancer(rebalancing, workers)

    async def serve(steps: int) -> list[int]:
        asked = []
        for _ in range(steps):
            await balancer.before_step()
            asked.append(workers[0].asked)
        return asked

    # Behind three steps, that is before the fourth, and so on.
    assert asyncio.run(serve(8)) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert workers[0].placements == workers[1].placements
    assert workers[0].placements[-1] == rebalancing.placement
    assert balancer.migrations[0].endswith("moved in 0.25 s")
