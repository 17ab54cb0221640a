"""The controller: an actor that starts, steps, switches and stops the workers of one run.

Clients (the command line) create it, read its events and tell it to stop. Tensors never
pass through it; it makes one call per worker and step.
"""

from __future__ import annotations

import traceback
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup

from dualray.actors.cluster import Connection
from dualray.actors.error_words import error_words
from dualray.actors.gang import Gang, WorkerLostError
from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.actors.stage_worker import WorkerSpec
from dualray.checkpoint.attached_files import restore_files
from dualray.checkpoint.reader import Reader
from dualray.data.dataset import TokenDataset
from dualray.errors import DualrayError
from dualray.parallel.nodes import NodeMap
from dualray.parallel.phases import phase_at
from dualray.parallel.slots import ExpertPlacement
from dualray.platform.assignment import Assignment
from dualray.platform.events import Event, EventLog, Note, StateChange
from dualray.platform.expert_moves import refuse_too_many_copies
from dualray.platform.life import Life
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.modes import mode_of
from dualray.platform.run_file import to_mapping
from dualray.platform.scheduling.choice import phase_with, start_of
from dualray.platform.serving import Serving, limits_of, owners_of
from dualray.platform.serving_memory import refuse_to_serve_beyond_memory
from dualray.platform.states import RunState, check_transition
from dualray.platform.training import Training
from dualray.platform.wishes import Wishes


class Controller:
    """See the module. `run` occupies one thread of the actor, the others answer clients."""

    def __init__(
        self, assignment: Assignment, group: PlacementGroup, connection: Connection
    ) -> None:
        self._a = assignment
        self._phases = assignment.run.phases()
        first = phase_at(self._phases, assignment.first_step)
        self._start = start_of(assignment.run.layout, first, assignment.remembered)
        self._first_phase = first
        self._placement, self._forgotten = assignment.run.experts.placement_after(
            assignment.placement, assignment.run.model, self._start.layout
        )
        self._nodes: NodeMap | None = None
        self._group = group
        self._connection = connection
        self._events = EventLog()
        self._state = RunState.STARTING
        self._wishes = Wishes(assignment.run.name)
        self._gang: Gang | None = None
        self._serving: Serving | None = None
        self._training: Training | None = None
        self._life: Life | None = None
        self._log: MetricsLog | None = None
        self._run_id = uuid.uuid4().hex[:12]

    def poll(self, first: int, timeout_s: float) -> list[Event]:
        """Events from number `first` on; waits for one up to `timeout_s`."""
        return self._events.read(first, timeout_s)

    def stop(self) -> None:
        """Ask the run to end: after the present step, with a committed checkpoint. Accepted
        requests get the time to end that the run file gives them."""
        self._wishes.stop()

    def switch(self, asked: str) -> ModeAnswer | Refusal:
        """Let the run train, serve or pause, and say so when it does; see `Mode`."""
        try:
            return self._wishes.ask(mode_of(asked))
        except DualrayError as error:
            return Refusal(sentence=error.sentence, hint=error.hint)

    def status(self) -> dict[str, Any]:
        """What `dualray status` shows."""
        done = self._a.first_step if self._training is None else self._training.steps_done
        mode = None if self._life is None else self._life.mode
        return self._snapshot() | {
            "mode": str(mode or ""),
            "step": done,
            "steps": self._phases[-1].end_step,
        }

    def placement(self) -> ExpertPlacement:
        """Where experts are, but for what has moved them since the run began to serve."""
        return self._placement if self._life is None else self._life.placement

    def run(self) -> None:
        """The whole life of the run; errors become the final state's reason."""
        try:
            self._live()
            self._wishes.close(f"run {self._a.run.name} is stopping", "start it again")
            self._release()
            self._enter(RunState.STOPPED)
        except Exception as error:
            reason = self._explain(error)
            self._wishes.close(f"run {self._a.run.name} has failed", "see what its command says")
            self._release()
            self._enter(RunState.FAILED, reason)

    def _live(self) -> None:
        run = self._a.run
        gang = self._gang = Gang.create(self._spec(), run.cluster, self._group, run.name)
        if self._a.trains:
            refuse_too_many_copies(run, self._start.layout, self._start.choice, gang.infos)
        if run.serve.after_training:
            last = self._phases[-1]
            refuse_to_serve_beyond_memory(
                last.model,
                last.train.dtype,
                self._start.layout,
                self._start.choice,
                self._placement,
                limits_of(run, last.model),
                gang.infos,
            )
        hosts = [info.node for info in gang.infos]
        self._nodes, unused = run.experts.nodes_of(self._start.layout, hosts)
        for word in filter(None, (unused, self._forgotten)):
            self._events.append(Note(word, warning=True))
        gang.start(self._nodes)
        tokenizer = self._prepare_tokenizer()
        serving = self._serving = Serving(run, gang, self._events)
        if run.serve.after_training:
            # Before training starts: a taken port must not be found out at its end.
            serving.listen(tokenizer, owners_of(self._start.layout, self._start.choice))
        self._a.folder.create(to_mapping(run))
        self._write_state()
        if self._a.restore_from is not None:
            path = str(self._a.restore_from)
            if self._a.resumes:
                gang.call("restore", path, self._a.first_step)
            else:
                gang.call("restore_weights", path)
        if self._wishes.must_stop:
            self._enter(RunState.STOPPING)
        else:
            self._life = self._begun(gang, serving)
            self._life.live()

    def _spec(self) -> WorkerSpec:
        run = self._a.run
        return WorkerSpec(
            phase=phase_with(self._first_phase, self._start.choice),
            layout=self._start.layout,
            placement=self._placement,
            experts=run.experts,
            data_path=str(Path(run.data.path).absolute()) if self._a.trains else None,
            tokenizer_path=str(self._a.folder.tokenizer),
            seed=run.seed,
            device="cuda" if run.cluster.gpus_per_worker else "cpu",
            threads=max(1, int(run.cluster.cpus_per_worker)),
        )

    def _prepare_tokenizer(self) -> Path:
        """Put the tokenizer into the run's folder, from where checkpoints take it."""
        folder = self._a.folder.tokenizer
        if self._a.trains:
            folder.mkdir(parents=True, exist_ok=True)
            TokenDataset.open(self._a.run.data.path, verify=False).tokenizer().save(folder)
        else:
            assert self._a.restore_from is not None
            restore_files(Reader(self._a.restore_from), "tokenizer", folder)
        return folder

    def _begun(self, gang: Gang, serving: Serving) -> Life:
        """What the run does now that its workers have started; training begins a new log."""
        run, first_step = self._a.run, self._a.first_step
        if self._a.trains:
            folder = self._a.folder
            self._log = (
                MetricsLog.resume(folder.metrics, first_step)
                if self._a.resumes
                else MetricsLog.create(folder.metrics)
            )
            self._training = Training(
                run,
                gang,
                folder,
                self._events,
                self._log,
                dataset=TokenDataset.open(run.data.path, verify=False),
                first_step=first_step,
                start=self._start,
                placement=self._placement,
                nodes=self._nodes,
            )
        return Life(
            self._a,
            gang,
            self._events,
            self._wishes,
            self._enter,
            serving,
            self._training,
            self._log,
            start=self._start,
            placement=self._placement,
            nodes=self._nodes,
        )

    def _release(self) -> None:
        """End every process of the run and give its reservation back."""
        if self._log is not None:
            self._log.close()
        if self._serving is not None:
            self._serving.stop()
        if self._gang is not None:
            self._gang.stop()
        ray.util.remove_placement_group(self._group)

    def _explain(self, error: Exception) -> str:
        if isinstance(error, RayTaskError) and isinstance(error.cause, DualrayError):
            error = error.cause  # the engine's own; str(RayTaskError) is a traceback
        if not isinstance(error, DualrayError):
            return f"{error_words(error)}; {self._keep_traceback(error)}."
        if not isinstance(error, WorkerLostError):
            if not isinstance(error.__cause__, RayTaskError):
                return str(error)
            return f"{error.sentence}; {error.hint}, and {self._keep_traceback(error)}."
        last = self._a.restore_from if self._a.resumes or not self._a.trains else None
        if self._training is not None:
            last = self._training.last_checkpoint or last
        if last is None:
            return f"{error.sentence}; no checkpoint was committed, start the run again."
        if not self._a.trains:
            return f"{error.sentence}; serve {last} again."
        return (
            f"{error.sentence}; the last committed checkpoint is {last}, continue from it with "
            "--resume."
        )

    def _keep_traceback(self, error: BaseException) -> str:
        path = self._a.folder.path / "error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f"{path} has the traceback"

    def _enter(self, state: RunState, reason: str = "") -> None:
        check_transition(self._state, state)
        self._state = state
        if self._a.folder.path.is_dir():
            self._write_state()
        self._events.append(StateChange(state, reason))

    def _snapshot(self) -> dict[str, Any]:
        infos = [] if self._gang is None else self._gang.infos
        return {
            "run_id": self._run_id,
            "name": self._a.run.name,
            "state": str(self._state),
            "address": self._connection.address,
            "target": self._target,
            "admin": None if self._serving is None else self._serving.admin_target,
            "workers": [{"rank": i.rank, "pid": i.pid, "node": i.node} for i in infos],
        }

    @property
    def _target(self) -> str | None:
        """Where the run serves at present."""
        if self._serving is None or self._state is not RunState.SERVING:
            return None
        return self._serving.target

    def _write_state(self) -> None:
        token = None if self._state.is_final else self._connection.auth_token
        self._a.folder.write_state(self._snapshot() | {"auth_token": token})
