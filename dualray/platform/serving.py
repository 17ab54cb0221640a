"""The serving half of a run's life: its engine, and the workers' way into serving and out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from dualray.actors.cluster import NAMESPACE
from dualray.actors.engine_actor import EngineActor
from dualray.actors.engine_state import EngineState
from dualray.actors.gang import Gang
from dualray.actors.vllm_tokenizer import model_files
from dualray.data.tokenizer import load_tokenizer
from dualray.inference.plan import Owner
from dualray.inference.scheduler import Limits, owners
from dualray.model.config import ModelConfig
from dualray.parallel.layout import Layout
from dualray.parallel.rebalancing import Rebalancing
from dualray.parallel.slots import ExpertPlacement
from dualray.platform.client import first_token_at
from dualray.platform.events import EventLog, Note
from dualray.platform.run_file import RunFile
from dualray.platform.scheduling.choice import Choice
from dualray.schedule.make import make_schedule

ON_HEAD_NODE = {"node:__internal_head__": 0.001}
"""Pins controller and engine to the head node, which a Kubernetes Service can select."""

_MORE_THAN_A_DRAIN_S = 60.0
"""For the engine's own word after a drain; a step that hangs must not keep a run from ending."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """How a gang came to serve. Times in seconds of the epoch."""

    started: float
    first_token: float
    pids: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    """Latent cache, by worker."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """How a gang stopped serving."""

    ended: float
    """When the workers were free, in seconds of the epoch."""
    drain_s: float
    num_cut: int
    """Accepted requests that did not end in time."""


class Serving:
    """The engine of a run and its gang's part in serving."""

    def __init__(self, run: RunFile, gang: Gang, events: EventLog) -> None:
        self._run, self._gang, self._events = run, gang, events
        self._engine: Any = None
        self._told = 0
        self._layout = run.layout
        self.lost: dict[int, int] = {}
        """Replicas that serve no more, and the rank that took them with it."""
        self.target: str | None = None
        """HOST:PORT on which the engine listens."""
        self.metrics: str | None = None
        """Where Prometheus finds its metrics, if the run shows them."""
        self.admin_target: str | None = None
        """HOST:PORT of its admin service, if it has one."""

    def listen(self, tokenizer: Path, owners: Sequence[Owner]) -> None:
        """Start the engine, which refuses requests for now; nothing happens if it is there.

        Raises what the engine raises if it cannot: a port that is taken, a file that is missing.
        """
        if self._engine is not None:
            return
        run, phase, text_side = self._run, self._run.phases()[-1], load_tokenizer(tokenizer)
        actor: Any = ray.remote(EngineActor)
        engine = actor.options(
            name=f"{run.name}.engine",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            resources=ON_HEAD_NODE,
        ).remote(
            model_name=run.name,
            tokenizer=text_side,
            owners=owners,
            limits=limits_of(run, phase.model),
            config=run.serve,
            workers=self._gang.workers,
            files=model_files(tokenizer, text_side, phase.model, phase.train.dtype),
        )
        try:
            listening: str = ray.get(engine.start.remote())
            metrics: str | None = None
            if run.serve.metrics_port is not None:
                metrics = ray.get(engine.metrics_url.remote())
            admin: str | None = ray.get(engine.admin_target.remote())
        except Exception:
            ray.kill(engine)
            raise
        self._engine = engine
        self.target = _reached(listening)
        if admin is not None:
            self.admin_target = _reached(admin)
            self._events.append(Note(f"admin service at {self.admin_target}"))
        if metrics is not None:
            scheme, _, at = metrics.partition("://")
            at, slash, path = at.partition("/")
            self.metrics = f"{scheme}://{_reached(at)}{slash}{path}"

    def begin(
        self,
        step: int,
        layout: Layout,
        owners: Sequence[Owner],
        rebalancing: Rebalancing | None,
        model: ModelConfig,
    ) -> Begun:
        """Let the workers serve what they hold, which is that of `step`, and ask for a token.

        They are arranged as `layout` says. `model` is that of the phase that they are in, which
        says how long a context may be.
        """
        started, limits = time.time(), limits_of(self._run, model)
        self._layout = layout
        config = self._run.serve
        self._gang.call("start_serving", limits, config.compile_batch, config.batch_invariant)
        digest = f"{sum(self._gang.call('digest')) % 2**128:032x}"
        ray.get(self._engine.serve.remote(step, digest, owners, rebalancing, limits, layout))
        self._told = 0
        own = ray.get(self._engine.own_access.remote())
        first_token = first_token_at(own.target, self._run.name, own.token)
        return Begun(
            started=started,
            first_token=first_token,
            pids=tuple(self._gang.pids()),
            cache_bytes=tuple(self._gang.call("cache_bytes")),
        )

    def look(self) -> None:
        """See that workers live, and tell when experts have moved.

        Raises WorkerLostError when no replica is whole.
        """
        self._look_for_the_dead()
        migrations = ray.get(self._engine.migrations.remote())
        for sentence in migrations[self._told :]:
            self._events.append(Note(f"experts while serving: {sentence}"))
        self._told = len(migrations)

    def _look_for_the_dead(self) -> None:
        layout, dead = self._layout, self._gang.dead_ranks()
        if not dead:
            return
        lost = {layout.coordinate(rank).replica: rank for rank in reversed(dead)}
        if len(lost) == layout.replicas:
            self._gang.call("info")  # raises, and says who has died
        for replica in lost.keys() - self.lost.keys():
            info = self._gang.infos[lost[replica]]
            self._events.append(
                Note(
                    f"worker {lost[replica]} (process {info.pid} on {info.node}) died, and replica "
                    f"{replica} serves no more; the others go on",
                    warning=True,
                )
            )
        self.lost = lost

    def _whole(self) -> Gang:
        """The workers of the replicas that serve."""
        replica_of = self._layout.coordinate
        ranks = range(len(self._gang.workers))
        return self._gang.without([r for r in ranks if replica_of(r).replica in self.lost])

    def stand(self, state: EngineState) -> None:
        """Let the engine say what the workers do while they do not serve."""
        if self._engine is not None:
            ray.get(self._engine.drain.remote(str(state), self._run.serve.drain_s))

    def leave(self, then: EngineState) -> Left:
        """Let accepted requests end, refuse new ones, and give the latent cache back."""
        started = time.time()
        limit_s = self._run.serve.drain_s
        num_cut = ray.get(
            self._engine.drain.remote(str(then), limit_s), timeout=limit_s + _MORE_THAN_A_DRAIN_S
        )
        ended = time.time()
        self._whole().call("stop_serving")
        if num_cut:
            requests = "request was" if num_cut == 1 else "requests were"
            self._events.append(
                Note(f"{num_cut} {requests} ended after {limit_s:g} s of draining", warning=True)
            )
        return Left(ended=ended, drain_s=ended - started, num_cut=num_cut)

    def end_pause(self) -> bool:
        """Let generation go on if somebody has paused it; returns whether it was paused."""
        return ray.get(self._engine.end_pause.remote())

    def placement(self) -> ExpertPlacement | None:
        """Where experts have moved to while serving; None if nothing could move them."""
        return ray.get(self._engine.placement.remote())

    def stop(self) -> None:
        """End the engine and whatever waits for it."""
        if self._engine is None:
            return
        try:
            ray.get(self._engine.stop.remote(), timeout=10)
        except Exception as error:  # it must not keep the workers from ending
            self._events.append(Note(f"the engine did not stop cleanly: {error}", warning=True))
        ray.kill(self._engine)
        self._engine = None


def _reached(listening: str) -> str:
    """Whoever listens on every address is reached at this node's own."""
    host, _, port = listening.rpartition(":")
    return f"{ray.util.get_node_ip_address()}:{port}" if host in ("0.0.0.0", "[::]") else listening


def limits_of(run: RunFile, model: ModelConfig) -> Limits:
    """What the engine can hold and run, in a phase with this model."""
    return run.serve.limits(model.max_position_embeddings, model.num_nextn_predict_layers)


def owners_of(layout: Layout, choice: Choice) -> tuple[Owner, ...]:
    """Who holds requests: as many directions as micro-batches enter in."""
    schedule = make_schedule(layout.schedule, layout.pipeline, choice.micro_batches)
    return owners(layout.replicas, layout.experts, len(schedule.entries))
