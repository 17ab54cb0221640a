"""How a run's workers are arranged at present, and how they get into another arrangement.

Another order of the same work, or other micro-batches, is a word to each worker. Another map of
stages to workers moves weights and optimizer states: a checkpoint is committed, the same processes
build their new stages, and read it. Nothing is lost if that fails, since the checkpoint stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualray.actors.gang import Gang
from dualray.errors import ConfigError
from dualray.parallel.phases import Phase
from dualray.parallel.spans import OPTIMIZER, SpanTuple
from dualray.parallel.step_result import StepResult
from dualray.platform.expert_moves import memory_bytes
from dualray.platform.run_file import RunFile
from dualray.platform.scheduler import Decision, Observation, Scheduler
from dualray.platform.scheduling.choice import (
    Choice,
    Situation,
    Start,
    choice_of,
    layout_with,
    phase_with,
    remember,
)
from dualray.platform.timeline import step_costs, walks_of
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule

Save = Callable[[], Path]
"""Commits a checkpoint of the present step and says where it is."""


class Arrangement:
    """The workers' layout, schedule and micro-batches, and the scheduler that decides them.

    There is a scheduler only if the run's layout leaves the schedule open.
    """

    def __init__(self, run: RunFile, gang: Gang, phase: Phase, start: Start) -> None:
        """`start` is how the workers have started."""
        self._run, self._gang = run, gang
        self.layout = start.layout
        self.phase = phase
        """The run file's own, whatever the micro-batches are at present."""
        self._choice = start.choice
        self._scheduler = self._new_scheduler(decided=start.decided)

    @property
    def choice(self) -> Choice:
        """What the workers do at present."""
        return self._choice

    @property
    def schedule(self) -> Schedule:
        return make_schedule(self.layout.schedule, self.layout.pipeline, self._choice.micro_batches)

    @property
    def remembered(self) -> dict[str, Any] | None:
        """What a checkpoint says, so that a resumed run goes on alike; None if all is pinned."""
        if self._scheduler is None:
            return None
        decided = not self._scheduler.is_measuring
        return remember(self._scheduler.choice, phase=self.phase.number, decided=decided)

    def enter(self, phase: Phase, steps_done: int, save: Save) -> None:
        """Go on with another phase. Its costs are others, so the scheduler begins anew.

        What was decided stays, unless the phase has too few micro-batches for it.
        """
        self.phase = phase
        try:
            self._order(choice_of(self.layout, phase))
        except ConfigError:
            self._change(choice_of(self._run.layout.concrete, phase), steps_done, save)
        self._scheduler = self._new_scheduler(decided=False)

    def prepare(self) -> bool:
        """Arrange the next step; says whether its costs are wanted."""
        if self._scheduler is None:
            return False
        if self._scheduler.next_choice != self._choice:
            self._order(self._scheduler.next_choice)
        return self._scheduler.wants_costs

    def after(self, results: Sequence[StepResult], step: int, save: Save) -> Decision | None:
        """A step is done; perhaps a decision, which has been carried out then."""
        if self._scheduler is None:
            return None
        wanted = self._scheduler.wants_costs
        spans = [result.spans for result in results]
        decision = self._scheduler.saw(self._observed(spans) if wanted else None)
        if decision is not None and decision.choice != self._choice:
            self._change(decision.choice, step, save)
        return decision

    def _observed(self, spans: Sequence[Sequence[SpanTuple]]) -> Observation:
        costs, exchange_s = step_costs(walks_of(spans, self.layout), self.schedule)
        after = [
            sum(end - start for _, category, start, end in own if category == OPTIMIZER)
            for own in spans
        ]
        return Observation(
            costs=costs,
            exchange_s=exchange_s,
            # Who comes last to a sum waits least.
            optimizer_s=min(after),
        )

    def _order(self, choice: Choice) -> None:
        """The same stages on the same workers, in another order or other micro-batches."""
        self._set(choice)
        self._gang.call("enter_phase", phase_with(self.phase, choice), self.layout)

    def _change(self, choice: Choice, step: int, save: Save) -> None:
        if self._places(choice) == self._places(self._choice):
            self._order(choice)
            return
        checkpoint = save()
        self._set(choice)
        self._gang.rebuild(self.layout, phase_with(self.phase, choice))
        self._gang.call("restore", str(checkpoint), step)

    def _places(self, choice: Choice) -> tuple[object, ...]:
        """Who holds which layers."""
        schedule = make_schedule(choice.schedule, self.layout.pipeline, choice.micro_batches)
        return schedule.stage_of, choice.layers

    def _set(self, choice: Choice) -> None:
        self._choice = choice
        self.layout = layout_with(self.layout, choice)

    def _new_scheduler(self, *, decided: bool) -> Scheduler | None:
        run, phase = self._run, self.phase
        if not run.layout.is_open:
            return None
        situation = Situation(
            model=phase.model,
            layout=run.layout.concrete,
            seq_len=phase.train.seq_len,
            dtype=phase.train.dtype,
            recompute=phase.train.recompute,
            memory_bytes=run.scheduler.memory_bytes or memory_bytes(self._gang.infos),
        )
        return Scheduler(run.scheduler, situation, self._choice, decided=decided)
