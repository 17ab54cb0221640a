"""Walks a schedule: the same object that was verified and drawn.

Receives are posted one step ahead, so that a message arrives while the step before it runs;
sends follow the action that produced them. A full backward runs its weight gradients at once,
an input-gradient backward queues them, a W runs the oldest queued batch. The two halves of an
overlapped pair take turns wherever one of them exchanges rows with other expert ranks, and a pair's
backward may begin before the forward of the pair before it has ended; else halves run in turn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dualray.model.attention import CausalAttention
from dualray.model.context import ExpertDispatch, ForwardContext, RoutingTape
from dualray.model.recompute import Recompute
from dualray.model.stage import Losses
from dualray.parallel.exchange import Exchange
from dualray.parallel.groups import BACKWARD, FORWARD
from dualray.parallel.inbox import Inbox
from dualray.parallel.micro_batch import MicroBatch, Objective, StepSums
from dualray.parallel.overlap import Arrival, Strands
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.spans import COMPUTE
from dualray.parallel.walkable import Walkable, WalkableStage
from dualray.parallel.weight_grads import WeightGrads
from dualray.schedule.actions import Action, Kind, Overlap, Schedule, flatten


@dataclass(kw_only=True)
class _Live:
    """A micro-batch between its forward and its backward on this rank."""

    x_TD: Tensor
    outputs: list[Tensor]
    is_last: bool


class Executor:
    """Runs schedules over the stages of one worker.

    `exchange` is what the dispatches send rows with, None if they keep them. With `overlapped`
    its journeys are filled with the other half of a pair and with weight gradients of the same
    backward; without, everything runs in turn, which is the slow twin of the same bits.
    """

    def __init__(
        self,
        held: Walkable,
        pipeline_rank: int,
        links: PipelineLinks,
        dispatches: Sequence[ExpertDispatch],
        weight_grads: WeightGrads,
        *,
        exchange: Exchange | None = None,
        overlapped: bool = True,
        recompute: bool = False,
    ) -> None:
        self._held = held
        self._rank = pipeline_rank
        self._links = links
        self._dispatches = dispatches
        self._weight_grads = weight_grads
        self._exchange = exchange
        self._recompute = recompute
        parameter = next(next(iter(held.stages.values())).parameters())
        self._dtype, self._device = parameter.dtype, parameter.device
        self._strands: Strands | None = None
        if exchange is not None and overlapped:
            self._strands = Strands(partial(_prepare_thread, self._device))

    def run(
        self,
        schedule: Schedule,
        micro_batches: Mapping[tuple[int, int], MicroBatch],
        objective: Objective,
        *,
        tapes: Mapping[tuple[int, int], RoutingTape] | None = None,
        timed: bool = False,
    ) -> StepSums:
        """Walk this rank's steps. Gradients end up in `main_grad`.

        `micro_batches` is keyed by (direction, index). `tapes` records or replays each
        micro-batch's routing on this rank's stages. `timed` lets a GPU finish each step before
        its end is noted.
        """
        walk = _Walk(self, schedule, micro_batches, objective, tapes or {}, timed)
        return walk.run()

    def close(self) -> None:
        """End the threads that move messages and those that overlapped pairs use."""
        if self._strands is not None:
            self._strands.close()
        if self._exchange is not None:
            self._exchange.close()
        self._links.close()

    def _meanwhile(self, arrival: Arrival | None) -> None:
        """While rows travel: the other strand, and weight gradients that have been put off."""
        assert self._strands is not None
        assert self._exchange is not None
        if arrival is not None:
            self._strands.wait(arrival, self._weight_grads.run_held, self._exchange.note_wait)
            return
        while self._weight_grads.run_held():
            pass
        self._strands.hand_over()


def _prepare_thread(device: torch.device) -> None:
    # No method: a pool of threads that held the executor would keep its weights from being freed.
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _Walk:
    """The state of one walk; see `Executor.run`."""

    def __init__(
        self,
        executor: Executor,
        schedule: Schedule,
        micro_batches: Mapping[tuple[int, int], MicroBatch],
        objective: Objective,
        tapes: Mapping[tuple[int, int], RoutingTape],
        timed: bool,
    ) -> None:
        self.e = executor
        self.schedule = schedule
        self.micro_batches = micro_batches
        self.objective = objective
        self.tapes = tapes
        self.waits_for_device = timed and executor._device.type == "cuda"
        self.sums = StepSums()
        self.live: dict[tuple[int, int], _Live] = {}
        self.steps = schedule.steps[executor._rank]
        self.trains = any(action.kind is not Kind.FORWARD for action in flatten(self.steps))
        self.inbox = Inbox(
            executor._links,
            schedule,
            executor._rank,
            lambda direction, index: micro_batches[direction, index].positions_T.numel(),
            width=executor._held.hidden_size,
            dtype=executor._dtype,
            device=executor._device,
            spans=self.sums.spans,
        )

    def run(self) -> StepSums:
        links, exchange, sums = self.e._links, self.e._exchange, self.sums
        links.waited_s = 0.0
        if exchange is not None:
            exchange.waited_s, exchange.spans = 0.0, sums.spans
            if self.trains and self.e._strands is not None:
                exchange.meanwhile = self.e._meanwhile
        started = time.perf_counter()
        try:
            with torch.set_grad_enabled(self.trains):
                number = 0
                while number < len(self.steps):
                    self._receive(number)
                    number = self._run(number)
                links.drain()
        finally:
            if exchange is not None:
                exchange.meanwhile = exchange.spans = None
        assert not self.live, "a micro-batch has no backward"
        assert self.inbox.is_empty, "a message was never taken"
        assert not len(self.e._weight_grads), "weight gradients are left"
        sums.elapsed_s = time.perf_counter() - started
        sums.waited_s = links.waited_s
        if exchange is not None:
            sums.exposed_s = exchange.waited_s
        return sums

    def _receive(self, number: int) -> None:
        """Wait for what step `number` needs, with room made for what the next one does."""
        self.inbox.post(number + 1)
        self.inbox.wait(number)

    def _run(self, number: int) -> int:
        """Run step `number`, and pairs that follow a pair in time; returns the step behind."""
        step, strands = self.steps[number], self.e._strands
        if isinstance(step, Overlap) and strands is not None:
            pairs = _Pairs(self, number)
            # The backward begins: its first message leaves after the least work, and the
            # forward's attention hides it.
            strands.run(pairs.backwards, pairs.forwards)
            return pairs.end()
        for action in flatten((step,)):
            begin = self._now()
            self._do(action)
            self.sums.spans.add(str(action), COMPUTE, begin, self._now())
        return number + 1

    def _now(self) -> float:
        if self.waits_for_device:
            torch.cuda.synchronize(self.e._device)
        return time.perf_counter()

    def _do(self, action: Action) -> None:
        weight_grads = self.e._weight_grads
        match action.kind:
            case Kind.FORWARD:
                self._forward(action)
            case Kind.BACKWARD if self.e._strands is not None:
                with weight_grads.holding():
                    self._backward(action)
            case Kind.BACKWARD:
                self._backward(action)
            case Kind.INPUT_GRAD:
                with weight_grads.deferring():
                    self._backward(action)
            case Kind.WEIGHT_GRAD:
                weight_grads.run_oldest()

    def _context(self, action: Action, batch: MicroBatch) -> ForwardContext:
        return ForwardContext(
            positions_T=batch.positions_T,
            seq_lens=batch.seq_lens,
            attention=CausalAttention(),
            dispatch=self.e._dispatches[action.direction],
            weight_grads=self.e._weight_grads if self.trains else None,
            balance_scale=self.objective.balance if self.trains else 0.0,
            aux_scale=self.objective.aux if self.trains else 0.0,
            loads=self.sums.loads if self.trains else None,
            tape=self.tapes.get(_key(action)),
            recompute=Recompute() if self.trains and self.e._recompute else None,
        )

    def _stage(self, action: Action) -> WalkableStage:
        return self.e._held.stages[self.schedule.stage_of[self.e._rank][action.direction]]

    def _forward(self, action: Action) -> None:
        key = _key(action)
        batch = self.micro_batches[key]
        ctx = self._context(action, batch)
        stage = self._stage(action)
        if self.inbox.source(action) is None:
            assert batch.ids_T is not None
            x_TD = stage.embed(batch.ids_T, ctx)
        else:
            x_TD = self.inbox.take(action)
            x_TD.requires_grad_(self.trains)
        y_TD = stage(x_TD, ctx)
        sink = self.schedule.downstream(self.e._rank, action.direction)
        if sink is None:
            assert batch.labels_DT is not None
            losses = stage.losses(y_TD, batch.labels_DT, ctx, with_mtp=self.trains)
            self._add(losses)
            outputs = [self.objective.of(losses)]
        else:
            self.inbox.send(FORWARD, action.micro_batch, y_TD, sink)
            outputs = [y_TD]
        if not self.trains:
            return
        balance = ctx.balance_loss()
        if balance is not None:
            self.sums.balance += float(balance.detach())
            outputs.append(balance)
        self.live[key] = _Live(x_TD=x_TD, outputs=outputs, is_last=sink is None)

    def _backward(self, action: Action) -> None:
        live = self.live.pop(_key(action))
        gradients: list[Tensor | None] = [None] * len(live.outputs)
        if not live.is_last:
            gradients[0] = self.inbox.take(action)
        torch.autograd.backward(live.outputs, gradients)
        sink = self.schedule.upstream(self.e._rank, action.direction)
        if sink is not None:
            assert live.x_TD.grad is not None
            self.inbox.send(BACKWARD, action.micro_batch, live.x_TD.grad, sink)

    def _add(self, losses: Losses) -> None:
        self.sums.main += float(losses.main.detach())
        if not self.sums.mtp:
            self.sums.mtp = [0.0] * len(losses.mtp)
        for depth, loss in enumerate(losses.mtp):
            self.sums.mtp[depth] += float(loss.detach())


def _key(action: Action) -> tuple[int, int]:
    return action.direction, action.micro_batch


class _Pairs:
    """Adjacent pairs in two strands, a forward and a backward at a time.

    When a backward has ended before its forward, the next pair's may begin if everything that
    pair receives is here: so the forward's last exchange, and the first of the next backward,
    are not waited for. No forward begins before the backward of the pair before it has ended,
    which would be one live micro-batch too many.
    """

    def __init__(self, walk: _Walk, first: int) -> None:
        self._walk = walk
        self._first = self._last = first
        """The first and last pair that have begun."""
        self._forwards_end = False
        self._begin = walk._now()

    def backwards(self) -> None:
        number = self._first
        while True:
            self._walk._do(self._pair(number).backward)
            number += 1
            if self._forwards_end or not self._may_begin(number):
                return
            self._walk._receive(number)
            self._last = number

    def forwards(self) -> None:
        number = self._first
        while True:
            self._walk._do(self._pair(number).forward)
            if number == self._last:
                self._forwards_end = True
                return
            self._note(number)
            number += 1

    def end(self) -> int:
        """Both strands have ended; the step behind the last pair."""
        self._note(self._last)
        return self._last + 1

    def _pair(self, number: int) -> Overlap:
        pair = self._walk.steps[number]
        assert isinstance(pair, Overlap)
        return pair

    def _may_begin(self, number: int) -> bool:
        """Whether there is such a pair, with all it receives, and not the backward of the very
        micro-batch whose forward is under way."""
        if number == len(self._walk.steps) or not self._walk.inbox.is_ready(number):
            return False
        step = self._walk.steps[number]
        return isinstance(step, Overlap) and _key(step.backward) in self._walk.live

    def _note(self, number: int) -> None:
        """A pair's time begins where that of the one before ends, though they overlap."""
        now = self._walk._now()
        self._walk.sums.spans.add(str(self._pair(number)), COMPUTE, self._begin, now)
        self._begin = now
