"""The served model of the benchmark: a Ray of its own, workers and engine as a run has them.

Weights are a seed's, which every side of the comparison can make by itself. Worker and engine
note when they did what; one machine's processes share its monotonic clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from dualray.actors.cluster import ClusterConfig, connect
from dualray.actors.engine_actor import EngineActor
from dualray.actors.gang import Gang
from dualray.actors.placement import reserve
from dualray.actors.stage_worker import StageWorker, WorkerSpec
from dualray.data.tokenizer import Tokenizer
from dualray.inference.plan import Outcome, StepPlan
from dualray.inference.request import SamplingParams
from dualray.inference.scheduler import owners
from dualray.inference.serve_config import ServeConfig
from dualray.model.config import ModelConfig
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.layout import Layout
from dualray.parallel.phases import Phase
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.train_config import TrainConfig
from dualray.platform.bench.serve_client import MODEL, Answer
from dualray.platform.bench.serve_requests import BenchRequest
from dualray.schedule.make import make_schedule

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is served, and by how many."""

    model: ModelConfig
    tokenizer: Tokenizer
    layout: Layout
    threads: int
    """Torch threads of each worker."""
    max_batch: int
    """Sequences that one owner decodes together."""
    max_context: int
    stream_interval_s: float
    """As `serve.stream_interval_s`."""


@dataclass(frozen=True, kw_only=True)
class WorkerStep:
    """What one worker did in a step: nanoseconds of the machine's monotonic clock."""

    step: int
    began_ns: int
    ended_ns: int
    cpu_ns: int
    """Processor time of the thread that walked, waiting left out."""


@dataclass(frozen=True, kw_only=True)
class EngineStep:
    """When the engine sent a step's plan and had all answers, on the same clock."""

    step: int
    num_tokens: int
    """That the plan runs, over all owners."""
    began_ns: int
    ended_ns: int


class TimedWorker(StageWorker):
    """Notes when it walked."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        super().__init__(spec, rank)
        self._steps: list[WorkerStep] = []

    def run_plan(self, plan: StepPlan) -> list[Outcome]:
        began, cpu = time.monotonic_ns(), time.thread_time_ns()
        sampled = super().run_plan(plan)
        self._steps.append(
            WorkerStep(
                step=plan.step,
                began_ns=began,
                ended_ns=time.monotonic_ns(),
                cpu_ns=time.thread_time_ns() - cpu,
            )
        )
        return sampled

    def take_steps(self) -> list[WorkerStep]:
        """What was noted since it was last asked."""
        steps, self._steps = self._steps, []
        return steps


class TimedEngine(EngineActor):
    """Notes when it stepped, and takes requests from inside of its process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._steps: list[EngineStep] = []

    async def _run_step(self, plan: StepPlan) -> list[Outcome]:
        began = time.monotonic_ns()
        sampled = await super()._run_step(plan)
        tokens = sum(len(s.ids) for sequences in plan.owners.values() for s in sequences)
        self._steps.append(
            EngineStep(
                step=plan.step, num_tokens=tokens, began_ns=began, ended_ns=time.monotonic_ns()
            )
        )
        return sampled

    async def take_steps(self) -> list[EngineStep]:
        """What was noted since it was last asked."""
        steps, self._steps = self._steps, []
        return steps

    async def set_stream_interval(self, seconds: float) -> None:
        """Of requests that come from now on."""
        self._engine.stream_interval_s = seconds

    async def direct(self, requests: Sequence[BenchRequest]) -> list[Answer]:
        """Each request's answer, asked of the engine itself when the request arrives."""
        started = time.perf_counter()

        async def ask(request: BenchRequest) -> Answer:
            await asyncio.sleep(max(0.0, request.arrives_s - time.perf_counter() + started))
            sent_s, first_s, text = time.perf_counter() - started, None, ""
            ids: list[int] = []
            params = SamplingParams.parse(request.sampling)
            async for delta in self._engine.submit(request.prompt, params):
                first_s = first_s or time.perf_counter() - started
                text += delta.text
                ids += [token.token_id for token in delta.tokens]
            assert first_s is not None
            return Answer(
                name=request.name,
                text=text,
                num_tokens=len(ids),
                ids=tuple(ids),
                sent_s=sent_s,
                first_s=first_s,
                last_s=time.perf_counter() - started,
            )

        return await asyncio.gather(*(ask(request) for request in requests))


class Server:
    """A deployment that serves. `target` is its gRPC address."""

    def __init__(self, gang: Gang, engine: Any, target: str) -> None:
        self._gang, self._engine = gang, engine
        self.target = target

    def direct(self, requests: Sequence[BenchRequest]) -> list[Answer]:
        return ray.get(self._engine.direct.remote(requests))

    def set_stream_interval(self, seconds: float) -> None:
        ray.get(self._engine.set_stream_interval.remote(seconds))

    def take_steps(self) -> tuple[list[EngineStep], list[list[WorkerStep]]]:
        """The engine's steps since it was last asked, and each worker's."""
        return ray.get(self._engine.take_steps.remote()), self._gang.call("take_steps")


@contextmanager
def served(deployment: Deployment) -> Iterator[Server]:
    """Bring the deployment up, and end every process of it afterwards."""
    cluster = ClusterConfig(cpus_per_worker=deployment.threads)
    layout = deployment.layout
    connection = connect(cluster, layout.world_size)
    try:
        group = reserve(layout.world_size, cluster, print, embedded=True)
        placed = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        spec = _spec(deployment)
        workers: list[Any] = [
            ray.remote(TimedWorker)
            .options(
                num_cpus=cluster.cpus_per_worker,
                scheduling_strategy=placed(group, placement_group_bundle_index=rank),
            )
            .remote(spec, rank)
            for rank in range(layout.world_size)
        ]
        gang = Gang(workers, [])
        gang.infos = gang.call("info")
        gang.start(None)
        config = ServeConfig(
            port=0,
            max_batch=deployment.max_batch,
            max_context=deployment.max_context,
            stream_interval_s=deployment.stream_interval_s,
        )
        limits = config.limits(deployment.model.max_position_embeddings)
        gang.call("start_serving", limits, 0)
        schedule = make_schedule(layout.schedule, layout.pipeline, spec.phase.train.micro_batches)
        holders = owners(layout.replicas, layout.experts, len(schedule.entries))
        engine: Any = (
            ray.remote(TimedEngine)
            .options(num_cpus=0)
            .remote(
                model_name=MODEL,
                tokenizer=deployment.tokenizer,
                owners=holders,
                limits=limits,
                config=config,
                workers=workers,
            )
        )
        target: str = ray.get(engine.start.remote())
        ray.get(engine.serve.remote(0, "", holders))
        yield Server(gang, engine, target)
        ray.get(engine.stop.remote(0.0))
        gang.stop()
    finally:
        connection.close()


def _spec(deployment: Deployment) -> WorkerSpec:
    layout = deployment.layout
    train = TrainConfig(
        steps=1,
        seq_len=16,
        micro_batches=2 * layout.pipeline,
        optimizer="adamw",
    )
    phase = Phase(number=0, first_step=0, tokens_before=0, model=deployment.model, train=train)
    return WorkerSpec(
        phase=phase,
        layout=layout,
        placement=contiguous_placement(deployment.model, layout.experts),
        experts=ExpertsConfig(),
        data_path=None,
        tokenizer_path="",
        seed=SEED,
        device="cpu",
        threads=deployment.threads,
    )
