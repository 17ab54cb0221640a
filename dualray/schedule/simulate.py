"""Event simulation of a schedule: when each step would run, given what each kind costs.

Exchanges are free. A step starts when its rank is idle and its inputs have been produced.
The picture is the same kind of thing as a measured timeline, so the two can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.schedule.actions import Kind, Overlap, Schedule, Step
from dualray.schedule.memory import Peaks, peaks_of
from dualray.schedule.verify import Completion, awaits, completes, halves, replay


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Duration of each kind of step, in any one unit. A full backward is I + W."""

    forward: float = 1.0
    """F: one forward of one stage."""
    input_grad: float = 1.0
    """I: the input-gradient part of a backward."""
    weight_grad: float = 1.0
    """W: the weight-gradient part of a backward."""
    overlapped: float = 3.0
    """F&B: a forward and a full backward together; F + I + W when nothing is gained."""

    def __post_init__(self) -> None:
        for field in ("forward", "input_grad", "weight_grad", "overlapped"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise ConfigError(
                    f"costs.{field} is {value} and must be a finite duration of at least 0",
                    hint="give four durations in one unit, such as 1,1,1,3",
                )

    @property
    def backward(self) -> float:
        """B = I + W."""
        return self.input_grad + self.weight_grad

    def of(self, step: Step) -> float:
        """How long `step` takes."""
        if isinstance(step, Overlap):
            return self.overlapped
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT_GRAD: self.input_grad,
            Kind.WEIGHT_GRAD: self.weight_grad,
        }[step.kind]


@dataclass(frozen=True)
class Timeline:
    """When every step of every rank starts and ends; `rows[rank]` is (step, start, end)."""

    rows: tuple[tuple[tuple[Step, float, float], ...], ...]
    peaks: Peaks

    @property
    def makespan(self) -> float:
        """End of the last step of all ranks, counted from 0."""
        return max((row[-1][2] for row in self.rows if row), default=0.0)

    @property
    def idle(self) -> tuple[float, ...]:
        """Per rank, the makespan less the time it works."""
        return tuple(self.makespan - sum(end - start for _, start, end in row) for row in self.rows)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time that is idle, 0 to 1."""
        return sum(self.idle) / (len(self.rows) * self.makespan) if self.makespan else 0.0


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Runs every step as early as its rank and inputs allow.

    Raises ScheduleError when the schedule deadlocks.
    """
    costs = costs or Costs()
    done: dict[Completion, float] = {}
    rows: list[list[tuple[Step, float, float]]] = [[] for _ in schedule.steps]
    for rank, _, step in replay(schedule):
        start = rows[rank][-1][2] if rows[rank] else 0.0
        for action in halves(step):
            need = awaits(schedule, rank, action)
            if need is not None:
                start = max(start, done[need])
        end = start + costs.of(step)
        rows[rank].append((step, start, end))
        for action in halves(step):
            made = completes(schedule, rank, action)
            if made is not None:
                done[made] = end
    return Timeline(tuple(map(tuple, rows)), peaks_of(schedule.steps))
