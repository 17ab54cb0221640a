"""What a started run does until it ends: it trains, serves or pauses, and switches when asked.

Each mode is a method that returns the next mode, or None at the end of the run. Clients' wishes
are looked at between two optimizer steps, and every other moment otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray.exceptions import RayTaskError

from dualray.actors.engine_state import EngineState
from dualray.actors.gang import Gang, WorkerLostError
from dualray.actors.mode_answer import Refusal
from dualray.data.dataset import TokenDataset
from dualray.data.yardsticks import yardsticks
from dualray.errors import DualrayError, RunError
from dualray.inference.plan import Owner
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.rebalancing import Rebalancing
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.state_place import StatePlace
from dualray.platform.assignment import Assignment
from dualray.platform.events import EventLog, Note
from dualray.platform.expert_moves import rebalancing_of
from dualray.platform.metrics import BackToTraining, ModeChange, Paused, Switch, Yardsticks
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.mode_words import answer, sentences
from dualray.platform.modes import Mode, Situation, already, must_switch
from dualray.platform.optimizer_place import OptimizerPlace
from dualray.platform.scheduling.choice import Choice, Start
from dualray.platform.serving import Left, Serving, owners_of
from dualray.platform.states import RunState
from dualray.platform.training import Training
from dualray.platform.wishes import Wishes
from dualray.schedule.make import make_schedule

LOOK_AFTER_WORKERS_S = 2.0


class Life:
    """A run whose workers have started. `live` occupies the thread that it is called on."""

    def __init__(
        self,
        assignment: Assignment,
        gang: Gang,
        events: EventLog,
        wishes: Wishes,
        enter: Callable[[RunState], None],
        serving: Serving,
        training: Training | None,
        log: MetricsLog | None,
        *,
        start: Start,
        placement: ExpertPlacement,
        nodes: NodeMap | None,
    ) -> None:
        """`training` and `log` are None for a run that only serves; `start`, `placement` and
        `nodes` say how workers have started and where experts are."""
        self._a, self._run, self._gang = assignment, assignment.run, gang
        self._events, self._wishes, self._enter = events, wishes, enter
        self._serving, self._training, self._log = serving, training, log
        self._start, self._placement, self._nodes = start, placement, nodes
        self.mode: Mode | None = None
        """What the run does now; None before it does anything."""
        self._left = Left(ended=time.time(), drain_s=0.0, num_cut=0)
        """How the last mode ended."""
        self._optimizer: OptimizerPlace | None = None
        if training is not None:
            wanted = StatePlace(self._run.serve.optimizer)
            self._optimizer = OptimizerPlace(wanted, gang, training)
        self._has_yardsticks = False
        self._stopping = False

    @property
    def steps_done(self) -> int:
        return self._a.first_step if self._training is None else self._training.steps_done

    def live(self) -> None:
        """Returns when the run has ended: done, or told to stop, with its state committed."""
        acts = {Mode.TRAIN: self._train, Mode.SERVE: self._serve, Mode.PAUSE: self._pause}
        mode: Mode | None = Mode.SERVE if self._training is None else Mode.TRAIN
        while mode is not None and not self._wishes.must_stop:
            mode = acts[mode]()
        self._begin_to_stop()
        if self._training is not None and not self._training.is_committed:
            assert self._optimizer is not None
            self._optimizer.bring_back()
            self._training.commit()

    def _train(self) -> Mode | None:
        training, before = self._training, self.mode
        assert training is not None
        assert self._optimizer is not None
        came_back_from = self._optimizer.bring_back()
        if before is not Mode.SERVE:
            self._serving.stand(EngineState.TRAINING)
        self._enters(Mode.TRAIN, RunState.TRAINING)
        first, told = training.steps_done, before is None
        asked: Mode | None = None

        def between() -> bool:
            nonlocal asked, told
            if not told:
                if training.steps_done == first:
                    return self._wishes.must_stop  # whoever asked waits for the first step
                told = True
                self._tell(
                    BackToTraining(
                        step=first + 1,
                        seconds_to_first_step=training.last_step_ended - self._left.ended,
                        came_from=str(before),
                        optimizer=str(came_back_from),
                        drain_s=self._left.drain_s,
                        num_cut=self._left.num_cut,
                    )
                )
            # Weights that no step has seen are nobody's to serve.
            asked = self._asked() if training.steps_done else None
            return self._wishes.must_stop or asked is not None

        training.run(between)
        if training.is_done and not self._wishes.must_stop:
            between()  # once more after the very last step
            training.commit()
            if asked is None and self._run.serve.after_training:
                asked = Mode.SERVE
        if asked is not None:
            self._enter(RunState.SWITCHING)
        return asked

    def _serve(self) -> Mode | None:
        before, training = self.mode, self._training
        # Without a step nothing has ended that could be timed.
        trained = before is Mode.TRAIN and self.steps_done > self._a.first_step
        pids = [info.pid for info in self._gang.infos]
        if before is None:
            self._enter(RunState.SWITCHING)
        started = time.time()
        if self._optimizer is not None:
            self._optimizer.put_away()
        try:
            begun = self._serving.begin(
                self.steps_done,
                self._present()[0],
                self._owners(),
                self._rebalancing(),
                self._run.model if training is None else training.phase.model,
            )
        except RunError as error:
            return self._cannot_serve(error, before)
        self._enters(Mode.SERVE, RunState.SERVING)
        workers = ", ".join(map(str, begun.pids))
        self._note(f"serving at {self._serving.target} from worker processes {workers}")
        if self._serving.metrics is not None:
            self._note(f"metrics at {self._serving.metrics}")
        since = training.last_step_ended if trained and training is not None else started
        away = self._optimizer
        sizes = [] if away is None else away.sizes
        came_from = str(Mode.TRAIN) if trained else str(before) if before is Mode.PAUSE else "start"
        change = Switch(
            seconds_to_first_token=begun.first_token - since,
            switch_s=begun.first_token - started,
            workers_before=pids,
            workers_after=begun.pids,
            step=self.steps_done,
            came_from=came_from,
            optimizer=None if away is None else str(away.place),
            kept_bytes=[each.kept for each in sizes],
            parked_bytes=[each.parked for each in sizes],
            dropped_bytes=[each.dropped for each in sizes],
            gradient_bytes=[each.gradients_freed for each in sizes],
            cache_bytes=begun.cache_bytes,
        )
        self._tell(change)
        if trained and self._log is not None and not self._has_yardsticks:
            self._has_yardsticks = True
            sticks = yardsticks(TokenDataset.open(self._run.data.path, verify=False))
            self._log.append(Yardsticks(**sticks))
        asked = self._wait(self._serving.look)
        if asked is None:
            self._begin_to_stop()
            then = EngineState.STOPPED
        else:
            self._enter(RunState.SWITCHING)
            then = EngineState.TRAINING if asked is Mode.TRAIN else EngineState.PAUSED
        self._left = self._serving.leave(then)
        self._found_at(self._serving.placement())
        return asked

    def _cannot_serve(self, error: RunError, before: Mode | None) -> Mode:
        """Back to the mode before if somebody asked for the switch and all workers live: no run
        shall end for want of a latent cache. Raises the error otherwise."""
        if before is None or self._wishes.mode is not Mode.SERVE:
            raise error
        if isinstance(error, WorkerLostError):
            raise error
        trains = before is Mode.TRAIN
        self._left = self._serving.leave(EngineState.TRAINING if trains else EngineState.PAUSED)
        self.mode = Mode.SERVE  # for what comes after, that is where it comes from
        self._wishes.answer(Refusal(sentence=error.sentence, hint=error.hint))
        return before

    def _pause(self) -> Mode | None:
        before = self.mode
        if before is Mode.TRAIN:
            self._serving.stand(EngineState.PAUSED)
        self._enters(Mode.PAUSE, RunState.PAUSED)
        left = self._left
        served = before is Mode.SERVE
        self._tell(
            Paused(
                step=self.steps_done,
                came_from=str(before),
                drain_s=left.drain_s if served else 0.0,
                num_cut=left.num_cut if served else 0,
            )
        )
        asked = self._wait(lambda: self._gang.call("info"))
        if asked is not None:
            self._enter(RunState.SWITCHING)
        self._left = Left(ended=time.time(), drain_s=0.0, num_cut=0)
        return asked

    def _wait(self, look: Callable[[], object]) -> Mode | None:
        """The mode to switch to, None when the run has to stop; looks after the workers."""
        while True:
            self._wishes.wait(LOOK_AFTER_WORKERS_S)
            if self._wishes.must_stop:
                return None
            asked = self._asked()
            if asked is not None:
                return asked
            look()

    def _asked(self) -> Mode | None:
        """The mode that somebody waits for, if the run can and has to switch; else they are
        told why not."""
        asked = self._wishes.mode
        if asked is None:
            return None
        try:
            now = self._situation(asked)
            if not must_switch(asked, now):
                ended_pause = asked is Mode.SERVE and self._serving.end_pause()
                self._wishes.answer(already(now, ended_pause=ended_pause))
                return None
            if asked is Mode.SERVE:
                self._serving.listen(self._a.folder.tokenizer, self._owners())
        except (DualrayError, RayTaskError) as error:
            reason = error.cause if isinstance(error, RayTaskError) else error
            if not isinstance(reason, DualrayError):
                raise
            self._wishes.answer(Refusal(sentence=reason.sentence, hint=reason.hint))
            return None
        return asked

    def _situation(self, asked: Mode) -> Situation:
        assert self.mode is not None
        away = self._optimizer
        return Situation(
            name=self._run.name,
            mode=self.mode,
            trains=self._training is not None,
            steps_done=self.steps_done,
            end_step=self._run.phases()[-1].end_step,
            lost_replicas=tuple(sorted(self._serving.lost)),
            lacks_checkpoint=asked is Mode.TRAIN and away is not None and not away.can_come_back(),
        )

    def _begin_to_stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._enter(RunState.STOPPING)

    def _enters(self, mode: Mode, state: RunState) -> None:
        self.mode = mode
        self._enter(state)

    def _tell(self, change: ModeChange) -> None:
        """Write a switch down, and say it to who reads along and to who has asked for it."""
        if self._log is not None:
            self._log.append(change)
        has_device = any(info.has_device for info in self._gang.infos)
        for sentence in sentences(change, has_device=has_device):
            self._note(sentence)
        target = self._serving.target
        said = answer(change, step=self.steps_done, target=target, has_device=has_device)
        # Somebody may have asked for yet another mode meanwhile.
        if self._wishes.mode == said.mode:
            self._wishes.answer(said)

    def _note(self, text: str) -> None:
        self._events.append(Note(text))

    @property
    def placement(self) -> ExpertPlacement:
        """Where experts are, but for what has moved them since the run began to serve."""
        return self._placement if self._training is None else self._training.experts.placement

    def _found_at(self, placement: ExpertPlacement | None) -> None:
        """Experts may have moved while the run served."""
        if placement is None:
            return
        self._placement = placement
        if self._training is not None:
            self._training.experts.found_at(placement)

    def _present(self) -> tuple[Layout, Choice]:
        """How the workers are arranged by now."""
        if self._training is None:
            return self._start.layout, self._start.choice
        return self._training.arrangement.layout, self._training.arrangement.choice

    def _owners(self) -> tuple[Owner, ...]:
        return owners_of(*self._present())

    def _rebalancing(self) -> Rebalancing | None:
        """What lets experts move while they serve, from where they are now."""
        if not self._run.experts.serve_rebalance_every:
            return None
        layout, choice = self._present()
        return rebalancing_of(
            self._run,
            layout,
            make_schedule(layout.schedule, layout.pipeline, choice.micro_batches),
            self.placement,
            self._nodes,
            trains=False,
            has_state=self._optimizer is not None and not self._optimizer.is_dropped,
        )
