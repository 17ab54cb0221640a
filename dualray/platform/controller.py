"""The controller: an actor that starts, steps, switches and stops the workers of one run.

Clients (the command line) create it, read its events and tell it to stop. Tensors never
pass through it; it makes one call per worker and step.
"""

from __future__ import annotations

import threading
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup

from dualray.actors.cluster import NAMESPACE, Connection
from dualray.actors.engine_actor import EngineActor
from dualray.actors.gang import Gang, WorkerLostError
from dualray.actors.stage_worker import WorkerSpec
from dualray.actors.vllm_tokenizer import model_files
from dualray.checkpoint.attached_files import restore_files
from dualray.checkpoint.reader import Reader
from dualray.data.dataset import TokenDataset
from dualray.data.tokenizer import load_tokenizer
from dualray.data.yardsticks import yardsticks
from dualray.errors import DualrayError
from dualray.inference.plan import Owner
from dualray.inference.scheduler import Limits, owners
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.phases import phase_at
from dualray.parallel.rebalancing import Rebalancing
from dualray.platform.assignment import Assignment
from dualray.platform.client import first_token_at
from dualray.platform.events import Event, EventLog, Note, StateChange
from dualray.platform.expert_moves import rebalancing_of, refuse_too_many_copies
from dualray.platform.metrics import Switch, Yardsticks
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.run_file import to_mapping
from dualray.platform.scheduling.choice import phase_with, start_of
from dualray.platform.states import RunState, check_transition
from dualray.platform.training import Training
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule

ON_HEAD_NODE = {"node:__internal_head__": 0.001}
"""Pins controller and engine to the head node, which a Kubernetes Service can select."""

_LOOK_AFTER_WORKERS_S = 2.0


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
        self._stop = threading.Event()
        self._gang: Gang | None = None
        self._engine: Any = None
        self._target: str | None = None
        self._training: Training | None = None
        self._run_id = uuid.uuid4().hex[:12]

    def poll(self, first: int, timeout_s: float) -> list[Event]:
        """Events from number `first` on; waits for one up to `timeout_s`."""
        return self._events.read(first, timeout_s)

    def stop(self) -> None:
        """Ask the run to end: after the present step, with a committed checkpoint."""
        self._stop.set()

    def status(self) -> dict[str, Any]:
        """What `dualray status` shows."""
        done = self._a.first_step if self._training is None else self._training.steps_done
        return self._snapshot() | {"step": done, "steps": self._phases[-1].end_step}

    def run(self) -> None:
        """The whole life of the run; errors become the final state's reason."""
        try:
            self._live()
            self._enter(RunState.STOPPING)
            self._release()
            self._enter(RunState.STOPPED)
        except Exception as error:
            reason = self._explain(error)
            self._release()
            self._enter(RunState.FAILED, reason)

    def _live(self) -> None:
        run = self._a.run
        gang = self._gang = Gang.create(self._spec(), run.cluster, self._group, run.name)
        if self._a.trains:
            refuse_too_many_copies(run, self._start.layout, self._start.choice, gang.infos)
        hosts = [info.node for info in gang.infos]
        self._nodes, unused = run.experts.nodes_of(self._start.layout, hosts)
        for word in filter(None, (unused, self._forgotten)):
            self._events.append(Note(word, warning=True))
        gang.start(self._nodes)
        tokenizer_source = self._prepare_tokenizer()
        if run.serve.after_training:
            self._start_engine(tokenizer_source)
        self._a.folder.create(to_mapping(run))
        self._write_state()
        if self._a.restore_from is not None:
            path = str(self._a.restore_from)
            if self._a.resumes:
                gang.call("restore", path, self._a.first_step)
            else:
                gang.call("restore_weights", path)
        ended = time.time()
        if self._a.trains and not self._stop.is_set():
            ended = self._train(gang)
        if run.serve.after_training and not self._stop.is_set():
            self._serve(gang, ended)
            self._look_after(gang)

    def _look_after(self, gang: Gang) -> None:
        """Until told to stop: see that workers live, and tell when experts move."""
        told = 0
        while not self._stop.wait(_LOOK_AFTER_WORKERS_S):
            gang.call("info")
            migrations = ray.get(self._engine.migrations.remote())
            for sentence in migrations[told:]:
                self._events.append(Note(f"experts while serving: {sentence}"))
            told = len(migrations)

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

    def _start_engine(self, tokenizer_folder: Path) -> None:
        """Listen before training starts: a taken port must not be found out at its end."""
        assert self._gang is not None
        run, serving = self._a.run, self._phases[-1]
        tokenizer = load_tokenizer(tokenizer_folder)
        actor: Any = ray.remote(EngineActor)
        self._engine = actor.options(
            name=f"{run.name}.engine",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            resources=ON_HEAD_NODE,
        ).remote(
            model_name=run.name,
            tokenizer=tokenizer,
            owners=self._owners(),
            limits=self._limits(),
            config=run.serve,
            workers=self._gang.workers,
            files=model_files(tokenizer_folder, tokenizer, serving.model, serving.train.dtype),
        )
        listening: str = ray.get(self._engine.start.remote())
        # Whoever listens on every address is reached at this node's own.
        host, _, port = listening.rpartition(":")
        if host in ("0.0.0.0", "[::]"):
            host = ray.util.get_node_ip_address()
        self._target = f"{host}:{port}"

    def _present(self) -> tuple[Layout, Schedule]:
        """How the workers are arranged by now."""
        layout, choice = self._start.layout, self._start.choice
        if self._training is not None:
            arrangement = self._training.arrangement
            layout, choice = arrangement.layout, arrangement.choice
        schedule = make_schedule(layout.schedule, layout.pipeline, choice.micro_batches)
        return layout, schedule

    def _owners(self) -> tuple[Owner, ...]:
        """Who holds requests: as many directions as micro-batches enter in at present."""
        layout, schedule = self._present()
        return owners(layout.replicas, layout.experts, len(schedule.entries))

    def _rebalancing(self) -> Rebalancing | None:
        """What lets experts move while they serve, from where they are now."""
        if not self._a.run.experts.serve_rebalance_every:
            return None
        trained = self._training
        return rebalancing_of(
            self._a.run,
            *self._present(),
            self._placement if trained is None else trained.experts.placement,
            self._nodes,
            trains=False,
            has_state=trained is not None,
        )

    def _limits(self) -> Limits:
        """What serves is the model of the last phase."""
        return self._a.run.serve.limits(self._phases[-1].model.max_position_embeddings)

    def _train(self, gang: Gang) -> float:
        folder = self._a.folder
        log = (
            MetricsLog.resume(folder.metrics, self._a.first_step)
            if self._a.resumes
            else MetricsLog.create(folder.metrics)
        )
        self._enter(RunState.TRAINING)
        with log:
            self._training = Training(
                self._a.run,
                gang,
                folder,
                self._events,
                log,
                dataset=TokenDataset.open(self._a.run.data.path, verify=False),
                first_step=self._a.first_step,
                start=self._start,
                placement=self._placement,
                nodes=self._nodes,
            )
            self._training.run(self._stop.is_set)
        return self._training.last_step_ended

    def _serve(self, gang: Gang, training_ended: float) -> None:
        before = [info.pid for info in gang.infos]
        self._enter(RunState.SWITCHING)
        started = time.time()
        gang.call("start_serving", self._limits(), self._a.run.serve.compile_batch)
        digest = f"{sum(gang.call('digest')) % 2**128:032x}"
        step = self._a.first_step if self._training is None else self._training.steps_done
        ray.get(self._engine.serve.remote(step, digest, self._owners(), self._rebalancing()))
        assert self._target is not None
        own = ray.get(self._engine.own_access.remote())
        first_token = first_token_at(own.target, self._a.run.name, own.token)
        after = gang.pids()
        self._enter(RunState.SERVING)
        self._events.append(
            Note(f"serving at {self._target} from worker processes {', '.join(map(str, after))}")
        )
        if self._training is None or step == self._a.first_step:
            return  # no optimizer step preceded the switch, so there is nothing to time
        total, switch = first_token - training_ended, first_token - started
        self._events.append(
            Note(
                f"first token {total:.1f} s after the last optimizer step ({switch:.1f} s for the "
                "switch itself, before it held-out evaluation and checkpoint)"
            )
        )
        with MetricsLog.resume(self._a.folder.metrics, step) as log:
            log.append(
                Switch(seconds_to_first_token=total, workers_before=before, workers_after=after)
            )
            sticks = yardsticks(TokenDataset.open(self._a.run.data.path, verify=False))
            log.append(Yardsticks(**sticks))

    def _release(self) -> None:
        """End every process of the run and give its reservation back."""
        if self._engine is not None:
            try:
                ray.get(self._engine.stop.remote(), timeout=10)
            except Exception as error:  # it must not keep the workers from ending
                self._events.append(Note(f"the engine did not stop cleanly: {error}", warning=True))
            ray.kill(self._engine)
        if self._gang is not None:
            self._gang.stop()
        ray.util.remove_placement_group(self._group)

    def _explain(self, error: Exception) -> str:
        if isinstance(error, RayTaskError) and isinstance(error.cause, DualrayError):
            error = error.cause  # the engine's own; str(RayTaskError) is a traceback
        if not isinstance(error, DualrayError):
            first_line = str(error).strip().partition("\n")[0]
            return f"{type(error).__name__}: {first_line}; {self._keep_traceback(error)}."
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
            "target": self._target if self._state is RunState.SERVING else None,
            "workers": [{"rank": i.rank, "pid": i.pid, "node": i.node} for i in infos],
        }

    def _write_state(self) -> None:
        token = None if self._state.is_final else self._connection.auth_token
        self._a.folder.write_state(self._snapshot() | {"auth_token": token})
