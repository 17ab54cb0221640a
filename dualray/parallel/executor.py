"""Walks a schedule: the same object that was verified and drawn.

Receives happen right before the action that needs them, sends right after the action that
produced them. A full backward runs its weight gradients at once, an input-gradient backward
queues them, a W runs the oldest queued batch. The two halves of an overlapped pair run in
turn.

T tokens, D model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualray.model.attention import CausalAttention
from dualray.model.context import ExpertDispatch, ForwardContext, RoutingTape
from dualray.model.stage import Losses, Stage
from dualray.parallel.groups import BACKWARD, FORWARD
from dualray.parallel.held import HeldStages
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.weight_grads import WeightGrads
from dualray.schedule.actions import Action, Kind, Schedule, flatten


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch as this worker sees it.

    `ids_T` is present where the direction enters, `labels_DT` (1 + MTP depths, T) where it
    ends; both are None in between.
    """

    positions_T: Tensor
    seq_lens: tuple[int, ...]
    ids_T: Tensor | None
    labels_DT: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Factors that turn sums into the step's loss: one over the global count of targets.

    `mtp[k]` already contains lambda / D. `balance` is alpha over the global number of
    sequences, the routing imbalance's share.
    """

    main: float
    mtp: tuple[float, ...]
    balance: float

    def of(self, losses: Losses) -> Tensor:
        total = losses.main * self.main
        for scale, loss in zip(self.mtp, losses.mtp):
            total = total + loss * scale
        return total


@dataclass(kw_only=True)
class StepSums:
    """What one walk measured on this worker. Sums in nats; seconds of wall time."""

    main: float = 0.0
    mtp: list[float] = field(default_factory=list)
    balance: float = 0.0
    loads: dict[int, Tensor] = field(default_factory=dict)
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)
    """(name, category, start, end) in seconds of the epoch."""
    elapsed_s: float = 0.0
    waited_s: float = 0.0


@dataclass(kw_only=True)
class _Live:
    """A micro-batch between its forward and its backward on this rank."""

    x_TD: Tensor
    outputs: list[Tensor]
    is_last: bool


class Executor:
    """Runs schedules over the stages of one worker."""

    def __init__(
        self,
        held: HeldStages,
        pipeline_rank: int,
        links: PipelineLinks,
        dispatches: Sequence[ExpertDispatch],
        weight_grads: WeightGrads,
    ) -> None:
        self._held = held
        self._rank = pipeline_rank
        self._links = links
        self._dispatches = dispatches
        self._weight_grads = weight_grads
        parameter = next(next(iter(held.stages.values())).parameters())
        self._dtype, self._device = parameter.dtype, parameter.device

    def run(
        self,
        schedule: Schedule,
        micro_batches: Mapping[tuple[int, int], MicroBatch],
        objective: Objective,
        *,
        tapes: Mapping[tuple[int, int], RoutingTape] | None = None,
    ) -> StepSums:
        """Walk this rank's steps. Gradients end up in `main_grad`.

        `micro_batches` is keyed by (direction, index). `tapes` records or replays each
        micro-batch's routing on this rank's stages.
        """
        walk = _Walk(self, schedule, micro_batches, objective, tapes or {})
        return walk.run()


class _Walk:
    """The state of one walk; see `Executor.run`."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        micro_batches: Mapping[tuple[int, int], MicroBatch],
        objective: Objective,
        tapes: Mapping[tuple[int, int], RoutingTape],
    ) -> None:
        self.e = executor
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.objective = objective
        self.tapes = tapes
        self.sums = StepSums()
        self.live: dict[tuple[int, int], _Live] = {}
        steps = schedule.steps[executor._rank]
        self.trains = any(action.kind is not Kind.FORWARD for action in flatten(steps))

    def run(self) -> StepSums:
        links = self.e._links
        links.waited_s = 0.0
        epoch = time.time() - time.perf_counter()
        started = time.perf_counter()
        with torch.set_grad_enabled(self.trains):
            for action in flatten(self.schedule.steps[self.e._rank]):
                waited, begin = links.waited_s, time.perf_counter()
                self._do(action)
                end = time.perf_counter()
                # Waiting for the input comes first within an action; what follows is work.
                ready = begin + links.waited_s - waited
                self.sums.spans.append((str(action), "compute", epoch + ready, epoch + end))
            links.drain()
        assert not self.live, "a micro-batch has no backward"
        assert not len(self.e._weight_grads), "weight gradients are left"
        self.sums.elapsed_s = time.perf_counter() - started
        self.sums.waited_s = links.waited_s
        return self.sums

    def _do(self, action: Action) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.BACKWARD:
                self._backward(action)
            case Kind.INPUT_GRAD:
                with self.e._weight_grads.deferring():
                    self._backward(action)
            case Kind.WEIGHT_GRAD:
                self.e._weight_grads.run_oldest()

    def _context(self, action: Action, batch: MicroBatch) -> ForwardContext:
        return ForwardContext(
            positions_T=batch.positions_T,
            seq_lens=batch.seq_lens,
            attention=CausalAttention(),
            dispatch=self.e._dispatches[action.direction],
            weight_grads=self.e._weight_grads if self.trains else None,
            balance_scale=self.objective.balance if self.trains else 0.0,
            loads=self.sums.loads if self.trains else None,
            tape=self.tapes.get((action.direction, action.micro_batch)),
        )

    def _stage(self, action: Action) -> Stage:
        return self.e._held.stages[self.schedule.stage_of[self.e._rank][action.direction]]

    def _forward(self, action: Action) -> None:
        key = (action.direction, action.micro_batch)
        batch = self.micro_batches[key]
        ctx = self._context(action, batch)
        stage = self._stage(action)
        source = self.schedule.upstream(self.e._rank, action.direction)
        if source is None:
            assert batch.ids_T is not None
            x_TD = stage.embed(batch.ids_T, ctx)
        else:
            x_TD = self._receive(FORWARD, action.direction, batch, source[0])
            x_TD.requires_grad_(self.trains)
        y_TD = stage(x_TD, ctx)
        sink = self.schedule.downstream(self.e._rank, action.direction)
        if sink is None:
            assert batch.labels_DT is not None
            losses = stage.losses(y_TD, batch.labels_DT, ctx, with_mtp=self.trains)
            self._add(losses)
            outputs = [self.objective.of(losses)]
        else:
            self.e._links.send(FORWARD, action.direction, y_TD, sink[0])
            outputs = [y_TD]
        if not self.trains:
            return
        balance = ctx.balance_loss()
        if balance is not None:
            self.sums.balance += float(balance.detach())
            outputs.append(balance)
        self.live[key] = _Live(x_TD=x_TD, outputs=outputs, is_last=sink is None)

    def _backward(self, action: Action) -> None:
        live = self.live.pop((action.direction, action.micro_batch))
        batch = self.micro_batches[action.direction, action.micro_batch]
        gradients: list[Tensor | None] = [None] * len(live.outputs)
        if not live.is_last:
            source = self.schedule.downstream(self.e._rank, action.direction)
            assert source is not None
            gradients[0] = self._receive(BACKWARD, action.direction, batch, source[0])
        torch.autograd.backward(live.outputs, gradients)
        sink = self.schedule.upstream(self.e._rank, action.direction)
        if sink is not None:
            assert live.x_TD.grad is not None
            self.e._links.send(BACKWARD, action.direction, live.x_TD.grad, sink[0])

    def _receive(self, kind: str, direction: int, batch: MicroBatch, source: int) -> Tensor:
        shape = (batch.positions_T.numel(), self.e._held.config.hidden_size)
        return self.e._links.receive(kind, direction, shape, self.e._dtype, self.e._device, source)

    def _add(self, losses: Losses) -> None:
        self.sums.main += float(losses.main.detach())
        if not self.sums.mtp:
            self.sums.mtp = [0.0] * len(losses.mtp)
        for depth, loss in enumerate(losses.mtp):
            self.sums.mtp[depth] += float(loss.detach())
