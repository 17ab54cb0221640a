"""When the workers are asked how evenly their experts are loaded, and what is shown of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch

from dualray.actors.expert_loads import EVERY_S, ExpertLoads, balancedness
from dualray.parallel.expert_meter import ExpertMeter, ExpertWork
from dualray.parallel.layout import Layout

LAYOUT = Layout(pipeline=2, experts=2, schedule="1f1b")


def work(**rows: list[int]) -> ExpertWork:
    return ExpertWork(slot_rows={int(k[1:]): v for k, v in rows.items()}, seconds={})


def by_rank(works: dict[tuple[int, int], ExpertWork]) -> list[ExpertWork]:
    """Of what (pipeline rank, expert rank) did, the list by world rank."""
    at = [LAYOUT.coordinate(rank) for rank in range(4)]
    return [works[c.pipeline, c.expert] for c in at]


def test_balance_is_the_mean_over_the_fullest_rank_of_each_layer():
    works = by_rank(
        {
            (0, 0): work(L1=[30, 0]),
            (0, 1): work(L1=[5, 5]),
            (1, 0): work(L2=[7, 3], L3=[0]),
            (1, 1): work(L2=[6, 4], L3=[0]),
        }
    )
    # Layer 1: 30 and 10 rows, the mean being 20. Layer 3 ran nothing.
    assert balancedness(LAYOUT, works) == {1: pytest.approx(20 / 30), 2: 1.0}


class Workers:
    """All say the same; a look costs each one question."""

    def __init__(self, asked: ExpertWork) -> None:
        self.num_asked, self.answer, self.lost = 0, asked, False
        self.handles = [SimpleNamespace(expert_rows=SimpleNamespace(remote=self._rows))] * 4

    async def _rows(self) -> ExpertWork:
        self.num_asked += 1
        if self.lost:
            raise ConnectionError("gone")
        return self.answer


def test_it_looks_now_and_then_and_not_at_what_training_left():
    workers, shown, now = Workers(work(L1=[3])), [], [100.0]
    loads = ExpertLoads(LAYOUT, workers.handles, shown.append, clock=lambda: now[0])

    def steps_at(moment: float) -> list[int]:
        now[0] = moment

        async def three():
            for _ in range(3):
                await loads.before_step()

        asyncio.run(three())
        return [workers.num_asked, len(shown)]

    assert steps_at(100.0) == [4, 0]
    assert steps_at(100.0 + EVERY_S - 0.1) == [4, 0]
    assert steps_at(100.0 + EVERY_S) == [8, 1]
    workers.lost = True
    assert steps_at(100.0 + 2 * EVERY_S) == [12, 1], "a step runs nevertheless"
    assert shown == [{1: 1.0}]


def test_taken_rows_are_counted_anew():
    meter = ExpertMeter()
    meter.rows[2] = torch.tensor([4, 0, 1])
    assert meter.take_rows() == ExpertWork(slot_rows={2: [4, 0, 1]}, seconds={})
    assert meter.take_rows() == ExpertWork(slot_rows={}, seconds={})
