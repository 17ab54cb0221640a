"""The same rank is full in every layer, so that layers alone cannot say what an overhead is.

Ranks are simulated: rows as a router and a placement make them, seconds as (rows + overhead) over
a speed. What the balancer is told of it is what workers would say.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.models import tiny_config

from dualray.model.config import ModelConfig
from dualray.parallel.balancer import rank_loads
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.rebalancing import Rebalancing
from dualray.schedule.make import make_schedule

RANKS, EXPERTS, ROWS = 4, 32, 4000
"""Rows of a layer in a step on all ranks together."""
LAYOUT = Layout(pipeline=1, experts=RANKS, schedule="1f1b")
CONFIG = ExpertsConfig(redundant=8, rebalance_every=6)
OVERHEADS = (0.0, 1000.0, 5000.0)


class Ranks:
    """Four ranks that compute what they are sent, and the balancer that watches them."""

    def __init__(
        self, layers: int, overhead: float, speeds: Sequence[float], *, noise: float, seed: int
    ) -> None:
        model = _model(layers)
        self.overhead, self.speeds, self.noise = overhead, speeds, noise
        self.random = np.random.default_rng(seed)
        self.rebalancing = Rebalancing(
            CONFIG, model, LAYOUT, make_schedule("1f1b", 1, 1),
            CONFIG.first_placement(model, LAYOUT),
            nodes=None, dtype=torch.bfloat16, trains=True, has_state=True,
        )  # fmt: skip
        # The first ten slots have 55 % of the rows, in every layer.
        share_E = np.linspace(1.0, 0.2, EXPERTS) ** 2
        held = self.rebalancing.placement.held[model.moe_layers[0]]
        hot = rank_loads(share_E, held) == rank_loads(share_E, held).max()
        lift = 0.5525 / 0.4475 * rank_loads(share_E, held)[~hot].sum()
        alone = [e for e in held[int(hot.argmax())] if sum(e in part for part in held) == 1]
        share_E[alone] *= (lift - rank_loads(share_E, held)[hot][0]) / share_E[alone].sum() + 1
        self.share_E = share_E / share_E.sum()
        self.step = 0
        self.looks = 0

    def look(self) -> None:
        """Steps until the balancer has looked, and what it decides done."""
        while True:
            self.step += 1
            proposal = self.rebalancing.saw(self._works(), step=self.step)
            if proposal is not None:
                break
        self.looks += 1
        if proposal.adopt:
            moved = Moved(layers=proposal.moved_layers, received_bytes=10**6, seconds=1e-3)
            self.rebalancing.moved(proposal.placement, [moved] * RANKS)

    def _works(self) -> list[ExpertWork]:
        works = [ExpertWork(slot_rows={}, seconds={}) for _ in range(RANKS)]
        for layer, held in self.rebalancing.placement.held.items():
            load_E = self.random.multinomial(ROWS, self.share_E)
            copies_E = np.bincount(np.concatenate(held), minlength=EXPERTS)
            for rank, (work, part) in enumerate(zip(works, held)):
                rows = [int(load_E[e] // copies_E[e]) for e in part]
                took = (sum(rows) + self.overhead) / self.speeds[rank] / 1e3
                work.slot_rows[layer] = rows
                work.seconds[layer] = took * self.random.uniform(1 - self.noise, 1 + self.noise)
        return works

    @property
    def imbalance(self) -> float:
        """Of the worst layer: rows over speed of the slowest rank, 1.0 if spread by speed."""
        even = 1 / sum(self.speeds)
        return max(
            float((rank_loads(self.share_E, held) / self.speeds).max() / even)
            for held in self.rebalancing.placement.held.values()
        )

    def share(self, rank: int) -> float:
        """Of the rows, on one rank, over all layers."""
        return float(
            np.mean([rank_loads(self.share_E, held)[rank] for held in
                     self.rebalancing.placement.held.values()])
        )  # fmt: skip


def _model(layers: int) -> ModelConfig:
    return tiny_config(
        n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=1, topk_group=1,
        num_hidden_layers=layers, first_k_dense_replace=0,
    )  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("overhead", OVERHEADS)
def test_an_overloaded_rank_is_relieved_whatever_the_overhead(overhead, layers, noise) -> None:
    ranks = Ranks(layers, overhead, [1.0] * RANKS, noise=noise, seed=layers)
    assert ranks.imbalance == pytest.approx(2.21, abs=0.01)
    for _ in range(3):
        ranks.look()
    assert ranks.imbalance <= 1.1


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("overhead", OVERHEADS)
def test_a_slow_rank_gets_its_share_beside_or_on_the_overloaded_one(
    overhead, slow, layers, noise
) -> None:
    speeds = [0.5 if rank == slow else 1.0 for rank in range(RANKS)]
    ranks = Ranks(layers, overhead, speeds, noise=noise, seed=layers)
    for _ in range(4):
        ranks.look()
    assert ranks.share(slow) == pytest.approx(0.5 / 3.5, rel=0.1)
    assert ranks.imbalance <= 1.1
    # What was learned stays: so does what was gained.
    for _ in range(12):
        ranks.look()
        assert ranks.imbalance <= 1.15


def test_equal_measurements_give_equal_placements_wherever_they_are_seen() -> None:
    one, other = (Ranks(2, 1000.0, [1.0] * RANKS, noise=0.05, seed=3) for _ in range(2))
    for _ in range(3):
        one.look()
        other.look()
        other.rebalancing = pickle.loads(pickle.dumps(other.rebalancing))
        assert one.rebalancing.placement == other.rebalancing.placement


@pytest.mark.parametrize("overhead", OVERHEADS)
def test_a_rank_that_becomes_slow_and_fast_again_is_followed(overhead) -> None:
    ranks = Ranks(1, overhead, [1.0] * RANKS, noise=0.05, seed=1)
    for speed in (1.0, 0.5, 1.0):
        ranks.speeds = [1.0, 1.0, speed, 1.0]
        for _ in range(4):
            ranks.look()
        assert ranks.imbalance <= 1.1
