"""A worker whose stages sleep: the real executor over a stand-in, step after step."""

from __future__ import annotations

import torch

from dualray.model.moe import LocalDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.executor import Executor
from dualray.parallel.micro_batch import MicroBatch, Objective, StepSums
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.weight_grads import WeightGrads
from dualray.platform.bench.sleeping_stage import Clock, LayerDurations, SleepingStages
from dualray.schedule.actions import Schedule
from dualray.schedule.words import has_pairs

_NUM_TOKENS = 4


class SleepingWorker:
    """Walks its steps of one schedule.

    Strands are for schedules with pairs. The others run as they were published and as they are
    simulated: a backward's weight gradient is done before its input gradient leaves. With strands
    it leaves before, which makes dualpipe and dualpipev 0.2 to 0.6 % faster than simulated, and
    would make 1f1b 4 to 6 % faster (simulated, 4 and 8 ranks).
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        links: PipelineLinks,
        layer: LayerDurations,
        num_layers: int,
        clock: Clock,
    ) -> None:
        """`num_layers` is of each stage. `links` may serve several workers, one after the other."""
        exchange = Exchange()
        numbers = sorted(set(schedule.stage_of[rank]))
        self.held = SleepingStages(numbers, num_layers, layer, clock, exchange)
        self._schedule = schedule
        self._executor = Executor(
            self.held,
            rank,
            links,
            [LocalDispatch(1)] * schedule.num_directions,
            WeightGrads(),
            exchange=exchange,
            overlapped=has_pairs(schedule),
        )
        ids_T = torch.zeros(_NUM_TOKENS, dtype=torch.int64)
        batch = MicroBatch(
            positions_T=ids_T, seq_lens=(_NUM_TOKENS,), ids_T=ids_T, labels_DT=ids_T[None]
        )
        self._micro_batches = {
            (direction, index): batch
            for direction in range(schedule.num_directions)
            for index in range(schedule.micro_batches_of(direction))
        }

    def step(self) -> StepSums:
        objective = Objective(main=1.0, mtp=(), balance=0.0)
        return self._executor.run(self._schedule, self._micro_batches, objective)

    def close(self) -> None:
        self._executor.close()
