"""What a run could do instead: schedules, micro-batch sizes and cuts, each with its forecast.

Pure: measured costs in, a ranking out. Every candidate trains on the same sequences a step; they
differ in how these are cut into micro-batches and in who does what when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from dualray.errors import ConfigError
from dualray.platform.planning.split import balanced_split
from dualray.platform.scheduling.choice import Choice, Situation
from dualray.platform.scheduling.layer_costs import Part, Sized, at_size, stages_of
from dualray.platform.scheduling.memory import worker_bytes
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs, simulate

_ROUNDS = 3
"""How often the cuts between stages are tried one layer to either side."""
_REFINED = 3
"""How many of the best candidates are worth that: each takes dozens of simulations."""
_GRAIN = 1000
"""Steps into which the longest layer's time is divided, so that equal layers compare as equal."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the first steps took, in seconds; `sizes` begins with the run's own size."""

    sizes: tuple[Sized, ...]
    exchange_s: float
    """From a pipeline rank to the next one."""
    optimizer_s: float
    """After a step's last backward: gradients summed over their copies, clipped, applied."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A choice, and what a step of it is expected to take."""

    choice: Choice
    step_s: float
    bubble: float
    """Mean idle share of the pipeline's ranks, 0 to 1."""
    memory_bytes: float
    """Of the fullest worker, estimated."""
    fits: bool


def forecast(choice: Choice, situation: Situation, measured: Measured) -> Forecast:
    """What one choice would take; of the optimizer's share it takes what is measured."""
    schedule = make_schedule(choice.schedule, situation.layout.pipeline, choice.micro_batches)
    parts = at_size(measured.sizes, choice.micro_batch_size)
    costs = [stage.costs for stage in stages_of(parts, choice.layers)]
    timeline = simulate(schedule, costs, exchange=measured.exchange_s)
    used = worker_bytes(choice, situation, schedule)
    return Forecast(
        choice=choice,
        step_s=timeline.makespan + measured.optimizer_s,
        bubble=timeline.bubble,
        memory_bytes=used,
        fits=used <= situation.memory_bytes,
    )


def rank(
    current: Choice,
    situation: Situation,
    measured: Measured,
    *,
    schedules: Sequence[str],
    cuts: bool,
) -> list[Forecast]:
    """The best choice of every schedule and measured or interpolated size, fastest first.

    Those that do not fit into memory come last. `cuts` lets the layers be cut otherwise than in
    `current`, where the number of stages allows to keep them.
    """
    found = []
    for kind in schedules:
        for size in _sizes(current, measured):
            choice = replace(
                current,
                schedule=kind,
                micro_batch_size=size,
                micro_batches=current.micro_batches * current.micro_batch_size // size,
            )
            try:
                schedule = make_schedule(kind, situation.layout.pipeline, choice.micro_batches)
            except ConfigError:
                continue  # this schedule does not exist for these numbers
            if schedule.num_stages > situation.model.num_hidden_layers:
                continue
            if not cuts and schedule.num_stages != len(current.layers):
                continue
            found.append(_first_cut(choice, schedule, situation, measured, cuts=cuts))
    found.sort(key=_worse)
    if cuts:
        found[:_REFINED] = [_refined(each, situation, measured) for each in found[:_REFINED]]
    return sorted(found, key=_worse)


def _worse(each: Forecast) -> tuple[bool, float]:
    return not each.fits, each.step_s


def _sizes(current: Choice, measured: Measured) -> Iterator[int]:
    """Micro-batch sizes that divide a step's sequences and that the measured line speaks for."""
    sequences = current.micro_batches * current.micro_batch_size
    if len(measured.sizes) == 1:
        yield current.micro_batch_size
        return
    largest = 2 * max(each.size for each in measured.sizes)
    yield from (size for size in range(1, largest + 1) if sequences % size == 0)


def _first_cut(
    choice: Choice, schedule: Schedule, situation: Situation, measured: Measured, *, cuts: bool
) -> Forecast:
    stages = schedule.num_stages
    starts = []
    if len(choice.layers) == stages:
        starts.append(choice.layers)
    if cuts:
        parts = at_size(measured.sizes, choice.micro_batch_size)
        starts.append(_balanced(parts, schedule))
    options = [
        forecast(replace(choice, layers=cut), situation, measured) for cut in dict.fromkeys(starts)
    ]
    return min(options, key=_worse)


def _refined(best: Forecast, situation: Situation, measured: Measured) -> Forecast:
    """A candidate with its cuts moved a layer at a time, as long as that gains something."""
    for _ in range(_ROUNDS):
        moved = [
            forecast(replace(best.choice, layers=cut), situation, measured)
            for cut in _moved(best.choice.layers)
        ]
        better = min(moved, key=_worse, default=best)
        if _worse(better) >= _worse(best):
            break
        best = better
    return best


def _balanced(parts: Sequence[Part], schedule: Schedule) -> tuple[int, ...]:
    """The cut whose longest rank is shortest."""
    *layers, last = (part.total - part.saving for part in parts)
    unit = max(layers) / _GRAIN
    paired = len(schedule.stage_of[0]) == 2
    return balanced_split(
        tuple(round(each / unit) for each in layers),
        round(last / unit),
        schedule.num_stages,
        paired=paired,
    )


def _moved(layers: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Cuts that differ by one layer at one border."""
    for border in range(len(layers) - 1):
        for step in (-1, 1):
            cut = list(layers)
            cut[border] += step
            cut[border + 1] -= step
            if min(cut) >= 1:
                yield tuple(cut)


def median_costs(steps: Sequence[Sequence[Costs]]) -> list[Costs]:
    """Stage by stage and kind by kind the median over several steps."""
    fields = ("forward", "input_grad", "weight_grad", "overlapped")
    return [
        Costs(**{name: median(getattr(cost, name) for cost in stage) for name in fields})
        for stage in zip(*steps, strict=True)
    ]
