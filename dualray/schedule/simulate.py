"""Event simulation of a schedule: when each step would run, given what each kind costs.

A step starts when its rank is idle and its inputs have arrived. An exchange delays an input
and occupies nobody. The picture is the same kind of thing as a measured timeline, so the two
can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step
from dualray.schedule.exchanges import Exchanges, Message, in_order
from dualray.schedule.memory import Peaks, peaks_of


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Duration of each kind of step of one stage, in any one unit. A full backward is I + W."""

    forward: float = 1.0
    """F: one forward of one stage; above 0."""
    input_grad: float = 1.0
    """I: the input-gradient part of a backward; above 0."""
    weight_grad: float = 1.0
    """W: the weight-gradient part of a backward; 0 where a backward has no such part."""
    overlapped: float = 3.0
    """F&B: a forward and a full backward together, above 0; F + I + W if nothing is gained."""

    def __post_init__(self) -> None:
        for field in ("forward", "input_grad", "weight_grad", "overlapped"):
            value = getattr(self, field)
            may_be_0 = field == "weight_grad"
            if not (0 < value < float("inf") or (may_be_0 and value == 0)):
                rule = (
                    "of at least 0 (0: a backward has no part to defer)" if may_be_0 else "above 0"
                )
                raise ConfigError(
                    f"costs.{field} is {value} and must be a finite duration {rule}",
                    hint="give four durations in one unit, such as 1,1,1,3",
                )

    @property
    def backward(self) -> float:
        """B = I + W."""
        return self.input_grad + self.weight_grad

    @property
    def saving(self) -> float:
        """What a pair takes less than its forward and backward in turn."""
        return self.forward + self.backward - self.overlapped

    def of(self, action: Action) -> float:
        """How long `action` takes by itself."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT_GRAD: self.input_grad,
            Kind.WEIGHT_GRAD: self.weight_grad,
        }[action.kind]


def paired(forward: Costs, backward: Costs) -> float:
    """Duration of a pair whose halves may belong to different stages.

    Equal stages take their F&B. Of two stages each hides half of what it would hide in a pair
    of its own, and the longer half is never hidden.
    """
    if forward == backward:
        return forward.overlapped
    in_turn = forward.forward + backward.backward
    saved = (forward.saving + backward.saving) / 2
    return max(in_turn - saved, forward.forward, backward.backward)


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
        makespan = self.makespan
        return tuple(makespan - sum(end - start for _, start, end in row) for row in self.rows)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time that is idle, 0 to 1."""
        return sum(self.idle) / (len(self.rows) * self.makespan) if self.makespan else 0.0


def simulate(
    schedule: Schedule, costs: Costs | Sequence[Costs] | None = None, *, exchange: float = 0.0
) -> Timeline:
    """Runs every step as early as its rank and inputs allow.

    `costs` holds for all stages, or there is one for each. `exchange` is the time, in the
    same unit, that a message to another rank takes; a hand-over within a rank takes none.
    Raises ScheduleError when the schedule deadlocks.
    """
    assert 0 <= exchange < float("inf"), exchange
    if costs is None or isinstance(costs, Costs):
        costs = (costs or Costs(),) * schedule.num_stages
    assert len(costs) == schedule.num_stages, (len(costs), schedule.num_stages)
    exchanges = Exchanges(schedule)
    arrives: dict[Message, float] = {}
    rows: list[list[tuple[Step, float, float]]] = [[] for _ in schedule.steps]
    duration_of = [_durations([costs[stage] for stage in held]) for held in schedule.stage_of]
    idle_from = [0.0] * schedule.num_ranks
    for rank, index in in_order(schedule, exchanges.takes, exchanges.makes):
        step = schedule.steps[rank][index]
        start = idle_from[rank]
        for message in exchanges.takes[rank][index]:
            start = max(start, arrives[message] + (exchange if message[1] != rank else 0.0))
        end = start + duration_of[rank](step)
        rows[rank].append((step, start, end))
        for message in exchanges.makes[rank][index]:
            arrives[message] = end
        idle_from[rank] = end
    return Timeline(tuple(map(tuple, rows)), peaks_of(schedule.steps))


def _durations(costs: Sequence[Costs]) -> Callable[[Step], float]:
    """Durations of one rank's steps, given the costs of its stage in each direction."""
    alone = [{kind: of_direction.of(Action(kind, 0, 0)) for kind in Kind} for of_direction in costs]
    pairs = [[paired(forward, backward) for backward in costs] for forward in costs]

    def duration(step: Step) -> float:
        if isinstance(step, Overlap):
            return pairs[step.forward.direction][step.backward.direction]
        return alone[step.direction][step.kind]

    return duration
