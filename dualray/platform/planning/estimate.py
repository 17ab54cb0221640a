"""One layout's step: how long it takes, what of it is idle or exposed, what it costs.

The schedule is the object that workers walk, timed by the simulator that `dualray schedule`
shows, with one table of costs for each stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dualray.model.formulas import training_flops
from dualray.platform.planning.fit import Fit
from dualray.platform.planning.memory import Memory
from dualray.platform.planning.setting import Candidate, Setting
from dualray.schedule.actions import Kind, Overlap, Step
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Timeline, simulate

TRILLION = 1e12
SECONDS_PER_HOUR = 3600
OVERLAPPED = "F&B"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is expected of one layout."""

    fit: Fit
    """The layout and what it was simulated with."""
    step_s: float
    """From one optimizer step to the next: phases, bubble and `fit.optimizer_s`."""
    bubble_s: float
    """Of it, what a rank waits for others, in the mean over the ranks."""
    phases_s: dict[str, float]
    """Of it, F, I, B, W and overlapped pairs (`F&B`) of a rank, in the mean."""
    num_actions: dict[str, float]
    """How many of each, in the mean."""
    exposed_s: float
    """Communication during which a rank computes nothing, in the mean: exchanges outside of
    pairs or longer than a pair's computation, and all but the passes of the optimizer's."""
    hidden_s: float
    """Exchanges behind computation, in the mean."""
    tokens_per_s_per_gpu: float
    """Trained tokens."""
    utilization: float
    """Of the BF16 peak; attention counts its causal half only (arXiv 2505.09343, table 4)."""
    dollars_per_gpu_hour: float
    """Rent."""

    @property
    def candidate(self) -> Candidate:
        return self.fit.candidate

    @property
    def memory(self) -> Memory:
        """Of the fullest GPU."""
        return self.fit.memory

    @property
    def bubble_fraction(self) -> float:
        """Part of a step, 0 to 1."""
        return self.bubble_s / self.step_s

    @property
    def gpu_hours_per_trillion(self) -> float:
        """GPU hours a trillion tokens."""
        return TRILLION / self.tokens_per_s_per_gpu / SECONDS_PER_HOUR

    @property
    def days_per_trillion(self) -> float:
        """Days a trillion tokens on all GPUs of the layout."""
        return self.gpu_hours_per_trillion / self.candidate.num_gpus / 24

    @property
    def dollars_per_trillion(self) -> float:
        """Rent a trillion tokens."""
        return self.gpu_hours_per_trillion * self.dollars_per_gpu_hour


def estimate(setting: Setting, fit: Fit) -> Estimate:
    """Simulates a layout that fits."""
    candidate = fit.candidate
    schedule = make_schedule(candidate.schedule, candidate.pipeline, candidate.micro_batches)
    timeline = simulate(schedule, fit.stage_costs, exchange=fit.hand_over_s)
    durations, num_ranks = _durations(timeline), len(timeline.rows)
    step_s = timeline.makespan + fit.optimizer_s
    exposed = hidden = 0.0
    for row, stages in zip(timeline.rows, schedule.stage_of):
        for step, start, end in row:
            exchanged, shown = _exchanged(step, end - start, stages, fit)
            exposed += shown
            hidden += exchanged - shown
    hardware = setting.cluster.hardware
    tokens = candidate.num_sequences * setting.seq_len / step_s / candidate.num_gpus
    flops = training_flops(setting.model, setting.seq_len, with_mtp=False)
    return Estimate(
        fit=fit,
        step_s=step_s,
        bubble_s=sum(timeline.idle) / num_ranks,
        phases_s={kind: sum(found) / num_ranks for kind, found in durations.items()},
        num_actions={kind: len(found) / num_ranks for kind, found in durations.items()},
        exposed_s=exposed / num_ranks + fit.reduction_s,
        hidden_s=hidden / num_ranks,
        tokens_per_s_per_gpu=tokens,
        utilization=tokens * flops / hardware.bf16_flops_per_s,
        dollars_per_gpu_hour=hardware.dollars_per_gpu_hour,
    )


def _durations(timeline: Timeline) -> dict[str, list[float]]:
    """Of all actions of all ranks, by kind."""
    durations: dict[str, list[float]] = {}
    for row in timeline.rows:
        for step, start, end in row:
            kind = OVERLAPPED if isinstance(step, Overlap) else step.kind.value
            durations.setdefault(kind, []).append(end - start)
    return durations


def _exchanged(
    step: Step, duration_s: float, stages: Sequence[int], fit: Fit
) -> tuple[float, float]:
    """Seconds that the exchanges of a step take, and those of them that are not hidden."""
    if not isinstance(step, Overlap):
        if step.kind is Kind.WEIGHT_GRAD:
            return 0.0, 0.0
        exchange = fit.stages[stages[step.direction]].exchange_s
        return exchange, exchange
    pair = [fit.stages[stages[action.direction]] for action in (step.forward, step.backward)]
    exchange = pair[0].exchange_s + pair[1].exchange_s
    computing = pair[0].shared_forward_s + pair[1].shared_backward_s
    return exchange, min(exchange, max(0.0, duration_s - computing))
