"""The engine as a Ray actor: gRPC server, engine, and calls to the workers.

Start it with `ray.remote(EngineActor)`; it keeps no tensors and no process groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import ray

from dualray.actors.admin_control import ControllerOf
from dualray.actors.admin_server import AdminServer
from dualray.actors.balancer import ServingBalancer
from dualray.actors.completion import Weights
from dualray.actors.engine import Engine, EngineState
from dualray.actors.expert_loads import ExpertLoads
from dualray.actors.grpc_security import OwnAccess
from dualray.actors.grpc_server import InferenceServer
from dualray.actors.metrics_server import MetricsServer
from dualray.actors.replicas import Replicas, ReplicasLostError
from dualray.data.tokenizer import Tokenizer
from dualray.inference.plan import Outcome, Owner, StepPlan
from dualray.inference.scheduler import Limits
from dualray.inference.serve_config import ServeConfig
from dualray.parallel.layout import Layout
from dualray.parallel.rebalancing import Rebalancing
from dualray.parallel.slots import ExpertPlacement


class EngineActor:
    """Forwards to `Engine`. Every worker handle has `open_plans(node) -> Door`."""

    def __init__(
        self,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        owners: Sequence[Owner],
        limits: Limits,
        config: ServeConfig,
        workers: Sequence[Any],
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """`files` are those of `model_files`, for gateways that ask for the tokenizer."""
        self._config = config
        self._workers = tuple(workers)
        self._replicas = Replicas()
        self._files = files
        self._engine = Engine(
            model_name=model_name,
            tokenizer=tokenizer,
            owners=owners,
            limits=limits,
            max_request_s=config.max_request_s,
            retry_after_s=config.retry_after_s,
            stream_interval_s=config.stream_interval_s,
            run_step=self._run_step,
            before_step=self._before_step,
        )
        self._balancer: ServingBalancer | None = None
        self._loads: ExpertLoads | None = None
        self._server: InferenceServer | None = None
        self._admin: AdminServer | None = None
        self._admin_target: str | None = None
        self._metrics: MetricsServer | None = None
        self._metrics_url: str | None = None

    async def start(self) -> str:
        """Listens, not serving yet; returns HOST:PORT.

        Raises:
            ConfigError: a file of the server's security cannot be used.
            ResourceError: the port is taken.
        """
        server = InferenceServer(self._engine, self._config, self._files)
        target = await server.start(self._config.host, self._config.port)
        self._server = server
        if self._config.admin_port is not None:
            control = ControllerOf(self._engine.model_name, self._moved_experts)
            self._admin = AdminServer(self._engine, self._config, control)
            self._admin_target = await self._admin.start(
                self._config.admin_host, self._config.admin_port
            )
        if self._config.metrics_port is not None:
            self._metrics = MetricsServer(self._engine.metrics.registry, self._config)
            at = await self._metrics.start(self._config.host, self._config.metrics_port)
            self._metrics_url = f"{self._metrics.scheme}://{at}/metrics"
        await self._engine.start()
        return target

    async def metrics_url(self) -> str | None:
        """Where the metrics are scraped, if they are."""
        return self._metrics_url

    async def own_access(self) -> OwnAccess:
        """How the controller reaches the server, however it is secured."""
        assert self._server is not None
        return self._server.own_access

    async def serve(
        self,
        training_step: int,
        digest: str,
        owners: Sequence[Owner],
        rebalancing: Rebalancing | None = None,
        limits: Limits | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Takes requests from now on, for the owners and limits that there are by now.

        With `rebalancing` experts move between workers as requests load them. With `layout`, how
        the workers are arranged, the metrics say how evenly that is.
        """
        self._balancer = self._loads = None
        if layout is not None and layout.experts > 1 and self._metrics is not None:
            self._loads = ExpertLoads(layout, self._workers, self._engine.metrics.show_balance)
        if rebalancing is not None:
            saw = None if self._loads is None else self._loads.saw
            self._balancer = ServingBalancer(rebalancing, self._workers, saw)
        node = ray.util.get_node_ip_address()
        doors = await asyncio.gather(*(w.open_plans.remote(node) for w in self._workers))
        await self._replicas.open(doors, len({owner.replica for owner in owners}))
        weights = Weights(training_step=training_step, digest=digest)
        await self._engine.serve(weights, owners, limits)

    async def drain(self, then: str = EngineState.TRAINING, within_s: float | None = None) -> int:
        """Lets accepted requests end and refuses new ones; the workers are free afterwards.

        Returns how many took longer than `within_s` seconds and were ended.
        """
        return await self._engine.drain(EngineState(then), within_s)

    async def end_pause(self) -> bool:
        """Lets generation go on if the admin service has paused it; returns whether it had."""
        return await self._engine.pausing.end_pause()

    async def placement(self) -> ExpertPlacement | None:
        """Where experts are since they were last served; None if they cannot move in serving."""
        return self._moved_experts()

    def _moved_experts(self) -> ExpertPlacement | None:
        return None if self._balancer is None else self._balancer.rebalancing.placement

    async def admin_target(self) -> str | None:
        """HOST:PORT of the admin service; None without one."""
        return self._admin_target

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ends requests and closes the ports; the metrics' last, so that they show the end."""
        await self._engine.stop()
        self._replicas.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._admin is not None:
            await self._admin.stop(grace_s)
        if self._metrics is not None:
            await self._metrics.stop()

    async def stats(self) -> dict[str, Any]:
        """Counters and the present load, as plain values."""
        scheduler = self._engine.scheduler
        return {
            "state": str(self._engine.state),
            "num_running": scheduler.num_running,
            "num_waiting": scheduler.num_waiting,
            "cache_usage": scheduler.cache_usage,
            "metrics_url": self._metrics_url,
            "drafts": asdict(scheduler.counts.drafts),
            **asdict(self._engine.weights),
            **asdict(self._engine.stats),
        }

    async def migrations(self) -> list[str]:
        """What moved experts while serving, a sentence for each time."""
        return [] if self._balancer is None else self._balancer.migrations

    async def lost_replicas(self) -> dict[int, str]:
        """Why a replica serves no more, of those that do not while others do."""
        return dict(self._replicas.lost)

    async def _before_step(self) -> None:
        if self._balancer is not None:
            await self._balancer.before_step()
        elif self._loads is not None:
            await self._loads.before_step()

    async def _run_step(self, plan: StepPlan) -> list[Outcome]:
        try:
            return await self._replicas.run(plan)
        except ReplicasLostError:
            self._loads = None
            self._balancer = None  # experts move on all replicas or on none
            raise
