"""One walk of a schedule by one worker of a layout, over a given global batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from support.models import whole_model

from dualray.model.config import ModelConfig
from dualray.model.init import logical_tensors
from dualray.model.moe import LocalDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.executor import Executor
from dualray.parallel.groups import Groups, Rendezvous, join
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Layout
from dualray.parallel.make_dispatch import make_dispatch
from dualray.parallel.micro_batch import MicroBatch, Objective, StepSums
from dualray.parallel.nodes import NodeMap
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.slots import contiguous_placement
from dualray.parallel.weight_grads import WeightGrads, attach_main_grads
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Walker:
    """A worker that has joined its layout; its weights are those of `whole_model`."""

    layout: Layout
    schedule: Schedule
    groups: Groups
    held: HeldStages
    executor: Executor
    first: int
    """The first of its micro-batches in the global batch."""

    def micro_batches(self, packed: list[tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]]):
        """This worker's share of (ids T, labels DT, sequence lengths), by (direction, index)."""
        batches = {}
        for direction in range(self.schedule.num_directions):
            entry = self.schedule.entry_of(direction)
            for index in range(self.schedule.micro_batches_of(direction)):
                number = self.first + entry * self.schedule.micro_batches_of(0) + index
                ids, labels, lengths = packed[number]
                batches[direction, index] = MicroBatch(
                    positions_T=torch.cat([torch.arange(n) for n in lengths]),
                    seq_lens=lengths,
                    ids_T=ids,
                    labels_DT=labels,
                )
        return batches

    def walk(self, packed, objective: Objective) -> StepSums:
        return self.executor.run(self.schedule, self.micro_batches(packed), objective)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.held.dense_parameters() | self.held.expert_parameters()


def make_walker(
    rank: int,
    config: ModelConfig,
    layout: Layout,
    port: int,
    *,
    global_micro_batches: int,
    dtype: torch.dtype = torch.float64,
    overlapped: bool = True,
    recompute: bool = False,
    nodes: NodeMap | None = None,
    fp8: bool = False,
) -> Walker:
    per_worker = global_micro_batches // (layout.replicas * layout.experts)
    schedule = make_schedule(layout.schedule, layout.pipeline, per_worker)
    rendezvous = Rendezvous(host="127.0.0.1", port=port, timeout_s=60)
    groups = join(layout, schedule, rank, rendezvous, device=CPU)
    at = layout.coordinate(rank)
    placement = contiguous_placement(config, layout.experts)
    held = HeldStages(
        config, schedule, at, placement, seed=0, dtype=dtype, device=CPU, layers=layout.layers
    )
    source = logical_tensors(whole_model(config, dtype=dtype))
    for stage in held.stages.values():
        for name, view in logical_tensors(stage).items():
            view.copy_(source[name])
    attach_main_grads([*held.dense_parameters().values(), *held.expert_parameters().values()])
    if held.embedding_copy is not None:
        attach_main_grads([held.embedding_copy.weight])
    exchange = Exchange()
    dispatches = [
        make_dispatch(placement, ways, CPU, exchange, nodes=nodes, fp8=fp8)
        if layout.experts > 1
        else LocalDispatch(config.n_routed_experts)
        for ways in groups.dispatch
    ]
    executor = Executor(
        held,
        at.pipeline,
        PipelineLinks(groups.channels, groups.pipeline_ranks),
        dispatches,
        WeightGrads(),
        exchange=exchange if layout.experts > 1 else None,
        overlapped=overlapped,
        recompute=recompute,
    )
    first = (at.replica * layout.experts + at.expert) * per_worker
    return Walker(layout, schedule, groups, held, executor, first)
