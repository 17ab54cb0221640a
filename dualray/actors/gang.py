"""All workers of a run as one: start together, be called together, fail with one reason."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dualray.actors.cluster import ClusterConfig
from dualray.actors.error_words import error_words
from dualray.actors.stage_worker import StageWorker, WorkerInfo, WorkerSpec
from dualray.errors import DualrayError, RunError
from dualray.parallel.groups import Rendezvous
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.phases import Phase

# After one worker fails its peers notice within a second; this bounds the wait for all to say why.
_REASONS_WITHIN_S = 15.0


class WorkerLostError(RunError):
    """A worker's process is gone."""


class Gang:
    """Handles of all workers, by rank."""

    def __init__(self, workers: list[Any], infos: list[WorkerInfo]) -> None:
        self.workers = workers
        self.infos = infos

    @classmethod
    def create(
        cls, spec: WorkerSpec, cluster: ClusterConfig, group: PlacementGroup, run_name: str
    ) -> Gang:
        """Create every worker in its bundle; they do not know each other yet."""
        actor = ray.remote(StageWorker)
        workers: list[Any] = [
            actor.options(
                name=f"{run_name}.worker.{rank}",
                num_cpus=cluster.cpus_per_worker,
                num_gpus=cluster.gpus_per_worker,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            ).remote(spec, rank)
            for rank in range(spec.layout.world_size)
        ]
        gang = cls(workers, [])
        gang.infos = gang.call("info")
        return gang

    def start(self, nodes: NodeMap | None) -> None:
        """Let workers find each other and build their stages; see StageWorker."""
        self.call("start", self._rendezvous(), nodes)

    def _rendezvous(self) -> Rendezvous:
        nodes = {info.node for info in self.infos}
        # Workers of one node meet over loopback, whatever its other addresses.
        host = "127.0.0.1" if len(nodes) == 1 else self.infos[0].node
        return ray.get(self.workers[0].host_rendezvous.remote(host))

    def rebuild(self, layout: Layout, phase: Phase) -> None:
        """Let the same processes hold the stages of another layout; see StageWorker."""
        self.call("rebuild", layout, phase, self._rendezvous())

    def dead_ranks(self) -> list[int]:
        """Ranks whose process is gone."""
        dead = []
        for rank, ref in enumerate([worker.info.remote() for worker in self.workers]):
            try:
                ray.get(ref)
            except RayActorError:
                dead.append(rank)
        return dead

    def without(self, ranks: Collection[int]) -> Gang:
        """The others: calls to it are by their order, not by rank."""
        left = [rank for rank in range(len(self.workers)) if rank not in ranks]
        return Gang([self.workers[r] for r in left], [self.infos[r] for r in left])

    def call(self, method: str, *args: Any) -> list[Any]:
        """The method's results by rank.

        Raises WorkerLostError if a worker died, or the error of a worker: a user's error as
        itself, anything else as RunError with the worker's traceback in its cause.
        """
        refs = [getattr(worker, method).remote(*args) for worker in self.workers]
        try:
            return ray.get(refs)
        except (RayActorError, RayTaskError):
            reason = self._reason(method, refs)
            raise reason from reason.__cause__

    def _reason(self, method: str, refs: Sequence[Any]) -> Exception:
        """Of all the workers' errors the one that explains the others.

        When a worker dies its peers fail too, with a closed connection; the death is the news.
        """
        errors: dict[int, Exception] = {}
        deadline = time.monotonic() + _REASONS_WITHIN_S
        for rank, ref in enumerate(refs):
            try:
                ray.get(ref, timeout=max(deadline - time.monotonic(), 0.1))
            except (RayActorError, RayTaskError) as error:
                errors[rank] = error
            except ray.exceptions.GetTimeoutError:
                continue
        for rank, error in errors.items():
            if isinstance(error, RayActorError):
                info = self.infos[rank] if rank < len(self.infos) else None
                where = f" (process {info.pid} on {info.node})" if info is not None else ""
                return WorkerLostError(
                    f"worker {rank}{where} died during {method}", hint="see its log"
                )
        causes = [(r, e.cause) for r, e in errors.items() if isinstance(e, RayTaskError)]
        for _, cause in causes:
            if isinstance(cause, DualrayError):
                return cause
        rank, cause = causes[0]
        reason = RunError(
            f"worker {rank} failed in {method} with {error_words(cause)}",
            hint="this is a bug in dualray or a broken node",
        )
        reason.__cause__ = errors[rank]
        return reason

    def pids(self) -> list[int]:
        """Process ids by rank, asked anew from the living processes."""
        return [info.pid for info in self.call("info")]

    def stop(self) -> None:
        """Let workers leave their groups, then end their processes."""
        farewell = [worker.stop.remote() for worker in self.workers]
        ray.wait(farewell, num_returns=len(farewell), timeout=5)
        for worker in self.workers:
            ray.kill(worker)
