"""The actor at one coordinate of the layout: a trainer, then a server, with one set of weights.

Thin on purpose: state plus forwarded calls. What the calls do is tested without Ray in the
layers below. Ray runs an actor's calls in order on one thread, which is what a process
group demands; plans come to another thread, when no such call is under way.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import ray
import torch
import xxhash
from torch.distributed import TCPStore

from dualray.actors.plan_channel import Door, PlanDoor
from dualray.checkpoint import trainer_state
from dualray.checkpoint.attached_files import file_pieces
from dualray.checkpoint.reader import Reader
from dualray.checkpoint.writer import RankFiles, write_rank
from dualray.data.dataset import TokenDataset
from dualray.data.loader import Loader
from dualray.errors import RunError
from dualray.inference.plan import Outcome, StepPlan
from dualray.inference.scheduler import Limits
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import PipelineTransport, StepRunner
from dualray.parallel.expert_groups import Moved
from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.groups import Rendezvous, host_rendezvous
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.phases import Phase
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.state_place import StateBytes, StatePlace
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.parallel.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What every worker of a run is told; only the rank differs."""

    phase: Phase
    """The one that the workers start in."""
    layout: Layout
    placement: ExpertPlacement
    experts: ExpertsConfig
    data_path: str | None
    """Token shards; None for a run that only serves."""
    tokenizer_path: str
    """Folder of the tokenizer, which rank 0 puts into checkpoints."""
    seed: int
    device: str
    """`cuda` if each worker was given GPUs, else `cpu`, whatever the node has."""
    threads: int
    """Torch threads of the worker; one on small machines, since GEMM bits depend on it."""


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """Where a worker lives."""

    rank: int
    pid: int
    node: str
    """Address of its node."""
    memory_bytes: float
    """Of its GPU, or of the whole node without one."""
    has_device: bool
    """Whether the memory is its own."""


class StageWorker:
    """Holds the stages and expert group of one rank; see the methods' owners for what they do."""

    def __init__(self, spec: WorkerSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self.phase = spec.phase
        self.node = ray.util.get_node_ip_address()
        self._trainer: Trainer | None = None
        self._loader: Loader | None = None
        self._runner: StepRunner | None = None
        self._door: PlanDoor | None = None
        self._store: TCPStore | None = None
        self._nodes: NodeMap | None = None
        torch.set_num_threads(spec.threads)

    def info(self) -> WorkerInfo:
        on_gpu = self.spec.device == "cuda"
        if on_gpu:
            memory_bytes = torch.cuda.get_device_properties(0).total_memory
        else:
            memory_bytes = psutil.virtual_memory().total
        return WorkerInfo(
            rank=self.rank,
            pid=os.getpid(),
            node=self.node,
            memory_bytes=memory_bytes,
            has_device=on_gpu,
        )

    def host_rendezvous(self, host: str) -> Rendezvous:
        """Open the meeting place of a new generation on this worker; rank 0 is asked."""
        self._store, rendezvous = host_rendezvous(host)
        return rendezvous

    def start(self, rendezvous: Rendezvous, nodes: NodeMap | None) -> None:
        """Build stages and join the other workers. A collective.

        `nodes` says which expert ranks are on one node, if they are on several.
        """
        self._nodes = nodes
        os.environ["GLOO_SOCKET_IFNAME"] = _interface_of(
            rendezvous.host if rendezvous.host == "127.0.0.1" else self.node
        )
        spec = self.spec
        if spec.data_path is not None:
            dataset = TokenDataset.open(spec.data_path, verify=self.rank == 0)
            self._loader = phase_loader(dataset, self.phase, seed=spec.seed)
        self._trainer = Trainer(
            model=self.phase.model,
            layout=spec.layout,
            train=self.phase.train,
            first_step=self.phase.first_step,
            placement=spec.placement,
            rank=self.rank,
            rendezvous=rendezvous,
            seed=spec.seed,
            device=torch.device(spec.device),
            hosted=self._store,
            only_serves=spec.data_path is None,
            nodes=nodes,
            experts=spec.experts,
        )

    @property
    def trainer(self) -> Trainer:
        assert self._trainer is not None, "start comes first"
        return self._trainer

    @property
    def loader(self) -> Loader:
        assert self._loader is not None, "this run has no data"
        return self._loader

    def enter_phase(self, phase: Phase, layout: Layout) -> None:
        """Let the next steps be those of `phase`, in the order of `layout`'s schedule."""
        self.phase, self.spec = phase, replace(self.spec, layout=layout)
        self.trainer.enter_phase(phase, layout)
        self._loader = phase_loader(self.loader.dataset, phase, seed=self.spec.seed)

    def rebuild(self, layout: Layout, phase: Phase, rendezvous: Rendezvous) -> None:
        """Build the stages of another layout in this process. A collective.

        Weights and optimizer state are new ones, to be restored.
        """
        self.stop()
        self.phase, self.spec = phase, replace(self.spec, layout=layout)
        self.start(rendezvous, self._nodes)

    def restore(self, checkpoint: str, step: int) -> None:
        """Weights and optimizer state after `step` optimizer steps."""
        trainer_state.restore(self.trainer, Reader(Path(checkpoint)), step=step)

    def restore_weights(self, checkpoint: str) -> None:
        """Weights alone, for a warm start or for serving."""
        trainer_state.restore_weights(self.trainer, Reader(Path(checkpoint)))

    def step(self, step: int, with_spans: bool) -> StepResult:
        """One optimizer step. A collective."""
        result = self.trainer.step(step, self.loader, timed=with_spans)
        if not with_spans:
            result.spans.clear()
        return result

    def move_experts(self, placement: ExpertPlacement) -> Moved:
        """Let experts live elsewhere, between two steps of training or serving. A collective."""
        moved = self.trainer.move_experts(placement)
        self.spec = replace(self.spec, placement=placement)
        return moved

    def expert_work(self) -> ExpertWork:
        """What the expert groups did in serving since they were last asked; training tells with
        each step."""
        work = self.trainer.meter.take()
        self.trainer.meter.begin()
        return work

    def expert_rows(self) -> ExpertWork:
        """What slots were sent since this was last asked; without seconds, which cost a little."""
        return self.trainer.meter.take_rows()

    def evaluate(self, num_batches: int | None) -> HeldOut:
        """Held-out loss over so many global batches, or all of them. A collective."""
        sequences = self.phase.train.global_sequences(self.spec.layout)
        available = self.loader.num_batches(sequences)
        count = available if num_batches is None else min(num_batches, available)
        return self.trainer.evaluate(self.loader, count)

    def write_checkpoint(self, folder: str) -> RankFiles:
        """This rank's share of a checkpoint, into a temporary folder that the controller made."""
        pieces = trainer_state.pieces(self.trainer)
        if self.rank == 0:
            tokenizer = file_pieces(Path(self.spec.tokenizer_path), "tokenizer")
            pieces = itertools.chain(pieces, tokenizer)
        return write_rank(Path(folder), self.rank, pieces)

    def digest(self) -> int:
        """Sum of xxh3 over name and values of each logical tensor that this rank is the first to
        hold. The sum over the workers does not depend on who holds what."""
        total = 0
        for piece in trainer_state.weight_pieces(self.trainer):
            digest = xxhash.xxh3_128(piece.name.encode())
            digest.update(piece.tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
            total += digest.intdigest()
        return total

    def start_serving(
        self, limits: Limits, compile_batch: int, batch_invariant: bool = False
    ) -> WorkerInfo:
        """Take a latent cache beside the weights that training left; nothing is copied."""
        trainer = self.trainer
        if self.spec.experts.serve_rebalance_every:
            trainer.meter.begin()
        stages = {
            direction: StageRunner(
                trainer.held.stages[stage],
                trainer.dispatches[direction],
                num_blocks=limits.num_blocks,
                block_size=limits.block_size,
                compile_batch=compile_batch,
                draft_modules=limits.draft_modules,
                invariant=batch_invariant,
            )
            for direction, stage in enumerate(trainer.schedule.stage_of[trainer.at.pipeline])
        }
        self._runner = StepRunner(
            replica=trainer.at.replica,
            expert=trainer.at.expert,
            stages=stages,
            entries={direction: trainer.schedule.entry_of(direction) for direction in stages},
            numbers=dict(enumerate(trainer.schedule.stage_of[trainer.at.pipeline])),
            num_stages=trainer.schedule.num_stages,
            transport=PipelineTransport(
                trainer.links, trainer.schedule, trainer.at.pipeline, trainer.device
            ),
        )
        return self.info()

    def cache_bytes(self) -> int:
        """Of the latent cache; 0 while the worker does not serve."""
        return 0 if self._runner is None else self._runner.cache_bytes

    def open_plans(self, engine_node: str) -> Door:
        """Let the engine on that node send plans, none but it; see `PlanDoor`."""
        self._close_plans()
        host = "127.0.0.1" if engine_node == self.node else self.node
        # OpenMP would count a new thread's threads by the environment.
        prepare = partial(torch.set_num_threads, self.spec.threads)
        self._door = PlanDoor(host, self.run_plan, prepare=prepare)
        return self._door.at

    def _close_plans(self) -> None:
        """A step that is under way ends first."""
        if self._door is not None:
            self._door.close()
            self._door = None

    def stop_serving(self) -> None:
        """Give the latent cache back."""
        self._close_plans()
        self._runner = None

    def put_state_away(self, place: str) -> StateBytes:
        """Keep, park or drop optimizer state; no step can be made until `bring_state_back`."""
        return self.trainer.put_state_away(StatePlace(place))

    def bring_state_back(self) -> None:
        """What was dropped has to be restored from a checkpoint then."""
        self.trainer.bring_state_back()

    def run_plan(self, plan: StepPlan) -> list[Outcome]:
        """One inference step. A collective over the replica's workers."""
        if self._runner is None:
            raise RunError(
                f"worker {self.rank} does not serve", hint="switch the run to serving first"
            )
        return self._runner.run(plan)

    def stop(self) -> None:
        """Leave the groups, so that peers do not wait for a process that is going away."""
        self._close_plans()
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None


def phase_loader(dataset: TokenDataset, phase: Phase, *, seed: int) -> Loader:
    """What the steps of a phase read."""
    return Loader(
        dataset,
        seed=seed,
        seq_len=phase.train.seq_len,
        depths=phase.model.num_nextn_predict_layers,
        first_step=phase.first_step,
        first_sample=phase.first_sample,
    )


def _interface_of(address: str) -> str:
    """Name of the network interface that has `address`; gloo would guess by host name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    raise RunError(
        f"no network interface of this node has the address {address}",
        hint="start Ray with the --node-ip-address of an interface that the other nodes reach",
    )
