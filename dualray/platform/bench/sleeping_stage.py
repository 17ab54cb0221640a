"""A stage that sleeps for as long as a real one would compute, for measuring schedules.

Sleeping needs no core, so eight ranks run side by side on two cores and each as fast as if it
had a machine of its own. Everything around the stage is the real thing: executor, strands,
weight-gradient queue, process groups. Only the rows between experts travel in thought: a
journey hands over to the other strand as `Exchange` does, and then sleeps until its message would
have arrived.

A layer's forward is: attention, dispatch, experts, combine; its input gradient the same way
back. The weight gradients of a stage are one closure behind its last journey, so that a backward
takes I + W, as `Costs` says. (Those of the real model also fill the journeys of their own
backward.) Every stage adds 1 to what passes through it, and counts its weight gradients in
`main_grad`, so that a walk that leaves something out is noticed.

T tokens, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dualray.model.context import ForwardContext, WeightGradSink
from dualray.model.stage import Losses
from dualray.parallel.exchange import Exchange
from dualray.parallel.weight_grads import attach_main_grads
from dualray.schedule.simulate import Costs


@dataclass(frozen=True, kw_only=True)
class LayerDurations:
    """How long the parts of one layer take, in seconds."""

    compute_s: float
    """Attention, or the experts: each of a forward, each of an input gradient, and each of the
    weight gradients."""
    journey_s: float
    """Rows on their way: dispatch, combine, or the gradients of either. At most `compute_s`,
    which then hides them in a pair."""

    def __post_init__(self) -> None:
        assert 0 < self.journey_s <= self.compute_s, self

    def costs(self, num_layers: int) -> Costs:
        """Of a stage with so many layers, if nothing but sleeping took time."""
        compute_s, alone_s = 2 * self.compute_s, 2 * (self.compute_s + self.journey_s)
        return Costs(
            forward=num_layers * alone_s,
            input_grad=num_layers * alone_s,
            weight_grad=num_layers * compute_s,
            overlapped=num_layers * 3 * compute_s,
        )


@dataclass(kw_only=True)
class Clock:
    """Sleeps from deadline to deadline.

    Within an action deadlines follow each other without gaps, so that what a sleep takes too
    long, and what is done between two, is taken off the next. One clock serves both strands of
    a worker, since only one of them is ever awake.
    """

    read: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    now_s: float = 0.0
    """The last deadline."""

    def begin(self) -> None:
        """An action begins: deadlines count from now."""
        self.now_s = self.read()

    def work(self, duration_s: float) -> None:
        self.until(self.now_s + duration_s)

    def until(self, deadline_s: float) -> None:
        """Returns at once if it is that late already."""
        self.now_s = max(self.now_s, deadline_s)
        self.sleep(max(0.0, self.now_s - self.read()))


class SleepingStage(nn.Module):
    """Some layers that sleep."""

    def __init__(
        self,
        num_layers: int,
        layer: LayerDurations,
        hidden_size: int,
        clock: Clock,
        exchange: Exchange,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.layer = layer
        self.clock = clock
        self.exchange = exchange
        self.weight = nn.Parameter(torch.zeros(hidden_size))

    def embed(self, ids_T: Tensor, ctx: ForwardContext) -> Tensor:
        """Zeros (T, D)."""
        return self.weight.new_zeros(ids_T.numel(), self.weight.numel())

    def forward(self, x_TD: Tensor, ctx: ForwardContext) -> Tensor:
        assert ctx.weight_grads is not None
        return _Layers.apply(x_TD, self.weight, self, ctx.weight_grads)

    def losses(
        self, hidden_TD: Tensor, labels_DT: Tensor, ctx: ForwardContext, *, with_mtp: bool = True
    ) -> Losses:
        """The mean of what arrives: how many stages it has passed through."""
        return Losses(main=hidden_TD.mean(), mtp=())

    def sleep_forward(self) -> None:
        self.clock.begin()
        for _ in range(self.num_layers):
            for _ in ("attention, dispatch", "experts, combine"):
                self.clock.work(self.layer.compute_s)
                self._journey()

    def sleep_input_grad(self) -> None:
        self.clock.begin()
        for _ in range(self.num_layers):
            for _ in ("combine, experts", "dispatch, attention"):
                self._journey()
                self.clock.work(self.layer.compute_s)

    def sleep_weight_grad(self) -> None:
        self.clock.begin()
        self.clock.work(2 * self.num_layers * self.layer.compute_s)

    def _journey(self) -> None:
        arrives_s = self.clock.now_s + self.layer.journey_s
        if self.exchange.meanwhile is not None:
            self.exchange.meanwhile(None)
        self.clock.until(arrives_s)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, stage: SleepingStage, sink: WeightGradSink
    ) -> Tensor:
        ctx.weight, ctx.stage, ctx.sink = weight, stage, sink
        stage.sleep_forward()
        return x_TD + 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None, None]:
        stage = ctx.stage

        def accumulate(main_grad: Tensor) -> None:
            stage.sleep_weight_grad()
            main_grad.add_(1)

        stage.sleep_input_grad()
        ctx.sink.submit(ctx.weight, accumulate)
        return dy_TD, None, None, None


class SleepingStages:
    """The stages of one worker, as the executor asks for them."""

    hidden_size = 8

    def __init__(
        self,
        numbers: Iterable[int],
        num_layers: int,
        layer: LayerDurations,
        clock: Clock,
        exchange: Exchange,
    ) -> None:
        self.stages = {
            number: SleepingStage(num_layers, layer, self.hidden_size, clock, exchange)
            for number in numbers
        }
        attach_main_grads(stage.weight for stage in self.stages.values())
