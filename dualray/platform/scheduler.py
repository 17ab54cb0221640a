"""The scheduler: measures the first steps, and decides what the workers do from then on.

It watches the steps of one phase of a run whose `layout.schedule` is `auto`. A few steps warm up,
a few are measured as the run file wants them, a few more with another micro-batch size, since the
cost of a micro-batch has a part that does not grow with it. Then every candidate is simulated with
what was measured, and the fastest that fits into memory is taken, if it gains enough over going on
as before. Later steps are looked at now and then; when their costs have drifted from those that
were decided by, all of it is done again.

Decisions are data. Who moves weights and cuts batches is `platform/arrangement.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from dualray.errors import ConfigError
from dualray.platform.scheduling.candidates import (
    Forecast,
    Measured,
    forecast,
    median_costs,
    rank,
)
from dualray.platform.scheduling.choice import Choice, Situation
from dualray.platform.scheduling.layer_costs import Sized, parts_of
from dualray.platform.scheduling.memory import worker_bytes
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Section `scheduler` of a run file; it speaks where `layout.schedule` is `auto`.

    `layout.layers` pins the cut into stages; a schedule named in `layout` pins everything.
    """

    schedules: tuple[str, ...] = tuple(KINDS)
    """Schedules to choose from."""
    tune_micro_batch_size: bool = True
    """Whether sequences may move between micro-batches; False pins train.micro_batch_size."""
    warmup_steps: int = 2
    """Steps that are not measured, at the start and after each change."""
    measure_steps: int = 3
    """Steps whose median counts, for each micro-batch size."""
    min_gain: float = 0.03
    """Share of the step's time that a change must gain, which costs a checkpoint and a pause."""
    check_every: int = 50
    """Steps between looks at the costs after a decision; 0 never looks again."""
    max_drift: float = 0.25
    """Share by which a stage's cost, relative to the others', may move before all is decided
    again."""
    memory_bytes: float | None = None
    """What a worker may fill; unset the GPU's memory, or its share of the node's without GPUs."""

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.schedules if kind not in KINDS]
        if unknown or not self.schedules:
            raise ConfigError(
                f"scheduler.schedules is {list(self.schedules)} and must name one or more of "
                f"{', '.join(KINDS)}",
                hint="leave it out to choose from all",
            )
        for field, least in (("warmup_steps", 0), ("measure_steps", 1), ("check_every", 0)):
            if getattr(self, field) < least:
                raise ConfigError(
                    f"scheduler.{field} is {getattr(self, field)} and must be at least {least}",
                    hint=f"set scheduler.{field} to {least} or more",
                )
        for field in ("min_gain", "max_drift"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ConfigError(
                    f"scheduler.{field} is {getattr(self, field)} and must be at least 0",
                    hint=f"set scheduler.{field} to 0 or more",
                )
        if self.memory_bytes is not None and not self.memory_bytes > 0:
            raise ConfigError(
                f"scheduler.memory_bytes is {self.memory_bytes} and must be above 0",
                hint="leave it out to take what the device has",
            )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one step took, in seconds."""

    costs: Sequence[Costs]
    """Of each stage."""
    exchange_s: float
    optimizer_s: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was found: `ranked` are the candidates, fastest first."""

    before: Forecast
    """Going on as until now."""
    after: Forecast
    """Doing what was decided."""
    ranked: tuple[Forecast, ...]
    reason: str
    """One sentence."""

    @property
    def choice(self) -> Choice:
        return self.after.choice


@dataclass(frozen=True, kw_only=True)
class _Trial:
    size: int
    counts: bool
    """Whether the step is measured, or warms up."""


class Scheduler:
    """Decides for one phase; `choice` is what the workers do at present."""

    def __init__(
        self, config: SchedulerConfig, situation: Situation, choice: Choice, *, decided: bool
    ) -> None:
        """`decided` says that the choice comes from an earlier decision, as in a resumed run."""
        self._config, self._situation = config, situation
        self.choice = choice
        self._trials: deque[_Trial] = deque()
        self._seen: dict[int, list[Observation]] = {}
        self._reference: list[float] | None = None
        """Shares of the costs at the first look after a decision."""
        self._looked: list[Sequence[Costs]] = []
        self._since = 0
        if not decided:
            self._begin()

    @property
    def is_measuring(self) -> bool:
        """Whether a decision is still to come."""
        return bool(self._trials)

    @property
    def next_choice(self) -> Choice:
        """What the next step is to do: the present choice, perhaps in other micro-batches."""
        return self._with_size(self._trials[0].size) if self._trials else self.choice

    @property
    def wants_costs(self) -> bool:
        """Whether the next step's costs are of interest."""
        if self._trials:
            return self._trials[0].counts
        every = self._config.check_every
        return every > 0 and every - self._since % every <= self._config.measure_steps

    def saw(self, observation: Observation | None) -> Decision | None:
        """A step is done; its observation is there if it was wanted. Perhaps a decision."""
        if not self._trials:
            self._since += 1
            if observation is not None:
                self._look(observation)
            return None
        trial = self._trials.popleft()
        if observation is not None and trial.counts:
            self._seen.setdefault(trial.size, []).append(observation)
        return None if self._trials else self._decide()

    def _begin(self) -> None:
        """Measure anew, beginning with the run's own micro-batches."""
        self._seen = {}
        own = self.choice.micro_batch_size
        sizes = [own]
        if self._config.tune_micro_batch_size and (other := self._other_size()):
            sizes.append(other)
        for size in sizes:
            warm = [_Trial(size=size, counts=False)] * self._config.warmup_steps
            counted = [_Trial(size=size, counts=True)] * self._config.measure_steps
            self._trials.extend([*warm, *counted])

    def _other_size(self) -> int | None:
        """Twice the micro-batch if the schedule allows so few of them, else half of it."""
        own, count = self.choice.micro_batch_size, self.choice.micro_batches
        if count % 2 == 0 and self._is_possible(self._with_size(2 * own)):
            return 2 * own
        return own // 2 if own % 2 == 0 else None

    def _is_possible(self, choice: Choice) -> bool:
        """Whether the schedule exists for so many micro-batches, and fits into memory."""
        try:
            schedule = make_schedule(
                choice.schedule, self._situation.layout.pipeline, choice.micro_batches
            )
        except ConfigError:
            return False
        used = worker_bytes(choice, self._situation, schedule)
        return used <= self._situation.memory_bytes

    def _with_size(self, size: int) -> Choice:
        sequences = self.choice.micro_batches * self.choice.micro_batch_size
        return replace(self.choice, micro_batch_size=size, micro_batches=sequences // size)

    def _decide(self) -> Decision:
        measured = self._measured()
        before = forecast(self.choice, self._situation, measured)
        ranked = rank(
            self.choice,
            self._situation,
            measured,
            schedules=self._config.schedules,
            cuts=not self._situation.layout.layers,
        )
        after, reason = self._pick(before, ranked)
        self.choice, self._since = after.choice, 0
        self._reference, self._looked = None, []
        return Decision(before=before, after=after, ranked=tuple(ranked), reason=reason)

    def _measured(self) -> Measured:
        own, model = self.choice.micro_batch_size, self._situation.model
        sizes = tuple(
            Sized(
                size=size,
                parts=parts_of(
                    median_costs([each.costs for each in seen]),
                    self.choice.layers,
                    model,
                    self._situation.seq_len,
                ),
            )
            for size, seen in self._seen.items()
        )
        everything = self._seen[own]
        return Measured(
            sizes=sizes,
            exchange_s=median(each.exchange_s for each in everything),
            optimizer_s=median(each.optimizer_s for each in everything),
        )

    def _pick(self, before: Forecast, ranked: Sequence[Forecast]) -> tuple[Forecast, str]:
        fitting = [each for each in ranked if each.fits]
        if not fitting:
            return before, "stays: nothing else exists for these numbers and fits into memory"
        best = fitting[0]
        gain = 1.0 - best.step_s / before.step_s
        allowed = self.choice.schedule in self._config.schedules
        if best.choice == self.choice:
            return before, "stays: nothing is faster"
        if not before.fits:
            return best, "changes: the present choice does not fit into memory"
        if not allowed:
            return best, "changes: the present schedule is not among scheduler.schedules"
        if gain < self._config.min_gain:
            return before, (
                f"stays: the fastest gains {gain:.1%} of a step and a change must gain "
                f"{self._config.min_gain:.1%}"
            )
        return best, f"changes: gains {gain:.1%} of a step"

    def _look(self, observation: Observation) -> None:
        """Begin anew if the costs have moved since the first look after the decision."""
        self._looked.append(observation.costs)
        if len(self._looked) < self._config.measure_steps:
            return
        now, self._looked = _shares(median_costs(self._looked)), []
        if self._reference is None:
            self._reference = now
            return
        limit = 1.0 + self._config.max_drift
        if any(
            not 1.0 / limit <= share / then <= limit
            for share, then in zip(now, self._reference, strict=True)
        ):
            self._begin()


def _shares(costs: Sequence[Costs]) -> list[float]:
    """What each stage's forward, backward and pair are of the sum of all.

    Shares, since a machine that became slower as a whole calls for no other schedule.
    """
    each = [part for cost in costs for part in (cost.forward, cost.backward, cost.overlapped)]
    return [part / sum(each) for part in each]
