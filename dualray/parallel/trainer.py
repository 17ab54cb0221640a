"""One worker's part of training: everything an actor forwards its calls to.

A step walks the schedule, sums gradients over the copies of each parameter, clips by the
global norm, lets the optimizer move the weights, and moves the router biases by the loads
of the whole global batch (arXiv 2412.19437, sections 2.1.2 and 4.2).
"""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.errors import RunError
from dualray.model.config import ModelConfig
from dualray.model.moe import LocalDispatch
from dualray.model.stage import IGNORED_LABEL
from dualray.parallel.balance import global_loads, max_violation, update_biases
from dualray.parallel.batches import Slicer, TokenSource
from dualray.parallel.dense_groups import dense_groups_of
from dualray.parallel.dispatch import AllToAllDispatch
from dualray.parallel.exchange import Exchange
from dualray.parallel.executor import Executor
from dualray.parallel.expert_groups import ExpertGroups, Moved
from dualray.parallel.expert_meter import ExpertMeter, ExpertWork
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.groups import Rendezvous, Ways, join, leave
from dualray.parallel.held import HeldStages
from dualray.parallel.layout import Layout
from dualray.parallel.lr import lr_at
from dualray.parallel.make_dispatch import make_dispatch
from dualray.parallel.micro_batch import MicroBatch, Objective, StepSums
from dualray.parallel.node_dispatch import NodeLimitedDispatch
from dualray.parallel.nodes import NodeMap
from dualray.parallel.optimizer import Joined, main_grad, make_optimizer
from dualray.parallel.p2p import PipelineLinks
from dualray.parallel.phases import Phase
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.spans import OPTIMIZER
from dualray.parallel.state_place import Shelf, StateBytes, StatePlace
from dualray.parallel.step_result import HeldOut, StepResult
from dualray.parallel.train_config import TrainConfig
from dualray.parallel.weight_grads import WeightGrads
from dualray.schedule.forward_only import forward_only
from dualray.schedule.make import make_schedule


class Trainer:
    """Stages, groups and optimizer of the worker at world rank `rank`."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        layout: Layout,
        train: TrainConfig,
        placement: ExpertPlacement,
        rank: int,
        rendezvous: Rendezvous,
        seed: int,
        device: torch.device,
        first_step: int = 0,
        hosted: dist.TCPStore | None = None,
        only_serves: bool = False,
        nodes: NodeMap | None = None,
        experts: ExpertsConfig | None = None,
    ) -> None:
        """Builds the stages and joins the others; `hosted` is rank 0's rendezvous store.

        The learning rate of `train` counts its steps from `first_step`. `only_serves` leaves
        gradients and optimizer state out. `nodes` says which expert ranks of a stage are on one
        node, if they are on several, and `experts` how tokens travel between them.
        """
        self.model, self.layout, self.train = model, layout, train
        self.rank = rank
        self.at = layout.coordinate(rank)
        self.device = device
        self.first_step = first_step
        self.nodes, self.experts_config = nodes, experts or ExpertsConfig()
        self.schedule = make_schedule(layout.schedule, layout.pipeline, train.micro_batches)
        self.held = HeldStages(
            model,
            self.schedule,
            self.at,
            placement,
            seed=seed,
            dtype=getattr(torch, train.dtype),
            device=self.device,
            layers=layout.layers,
        )
        self.groups = join(layout, self.schedule, rank, rendezvous, device=device, hosted=hosted)
        self.weight_grads = WeightGrads()
        self.exchange = exchange = Exchange()
        config = train.optimizer_config()
        self.experts = ExpertGroups(
            self.held,
            self.groups,
            placement,
            self.at.expert,
            exchange,
            None if only_serves else config,
        )
        param_groups = [] if only_serves else dense_groups_of(self.held, self.groups)
        self._dense = [param for group in param_groups for _, param in group.params]
        self.optimizer = Joined([make_optimizer(param_groups, config), self.experts.optimizer])
        self._shelf: Shelf | None = None
        self.meter = ExpertMeter()
        self.meter.watch(self.held.experts())
        self.dispatches = [self._dispatch(ways, exchange) for ways in self.groups.dispatch]
        self.links = PipelineLinks(self.groups.channels, self.groups.pipeline_ranks)
        self.executor = Executor(
            self.held,
            self.at.pipeline,
            self.links,
            self.dispatches,
            self.weight_grads,
            exchange=exchange if layout.experts > 1 else None,
            overlapped=train.overlap,
            recompute=train.recompute,
        )
        self.slicer = self._slicer()

    def enter_phase(self, phase: Phase, layout: Layout) -> None:
        """Go on with other positions, sequences, learning rates, micro-batches or schedule.

        Weights, moments and router biases stay. Stages and optimizer are those that the trainer
        was built with: `phase.model` may differ in nothing but `rope_scaling` and
        `max_position_embeddings`, and `layout` in nothing but a schedule with the same stages on
        the same workers.
        """
        self.model, self.train, self.first_step = phase.model, phase.train, phase.first_step
        self.layout, stages = layout, self.schedule.stage_of
        self.schedule = make_schedule(
            self.layout.schedule, self.layout.pipeline, phase.train.micro_batches
        )
        assert self.schedule.stage_of == stages, (layout.schedule, stages)
        self.held.set_rope(phase.model)
        self.slicer = self._slicer()

    def _slicer(self) -> Slicer:
        return Slicer(
            layout=self.layout,
            schedule=self.schedule,
            train=self.train,
            at=self.at,
            device=self.device,
        )

    def _dispatch(
        self, ways: Ways, exchange: Exchange
    ) -> LocalDispatch | AllToAllDispatch | NodeLimitedDispatch:
        if self.layout.experts == 1:
            return LocalDispatch(self.model.n_routed_experts)
        return make_dispatch(
            self.placement,
            ways,
            self.device,
            exchange,
            rows=self.meter.rows,
            nodes=None if self.experts_config.dispatch == "flat" else self.nodes,
            fp8=self.experts_config.fp8_dispatch,
        )

    @property
    def placement(self) -> ExpertPlacement:
        """Where experts are at present."""
        return self.experts.placement

    def move_experts(self, placement: ExpertPlacement) -> Moved:
        """Let experts live elsewhere from now on, between two steps. A collective over the world.

        Weights, master weights and moments move with them. Raises what the exchange raises if a
        worker is lost meanwhile; every layer is whole then, in its old place or its new one.
        """
        try:
            moved = self.experts.move(placement)
        finally:
            for dispatch in self.dispatches:
                assert not isinstance(dispatch, LocalDispatch), "a single rank has all experts"
                dispatch.place(self.placement)
        experts = self.held.experts()
        self.meter.watch({layer: experts[layer] for layer in moved.layers})
        return moved

    def put_state_away(self, place: StatePlace, *, leave_host: bool = True) -> StateBytes:
        """Keep, park or drop optimizer state until `bring_state_back`; see `Shelf`. No step may be
        made meanwhile. A worker that only serves has none."""
        assert self._shelf is None, "it is away already"
        state = self.optimizer.parts[0].state_tensors()
        grads = [main_grad(param) for param in self._dense]
        self._shelf = Shelf(place, state, grads, leave_host=leave_host)
        return self._shelf.size + self.experts.put_state_away(place, leave_host=leave_host)

    def bring_state_back(self) -> None:
        """Undo `put_state_away`. What was dropped has to be restored from a checkpoint then."""
        if self._shelf is not None:
            self._shelf.bring_back()
            self._shelf = None
            self.experts.bring_state_back()

    def weights_were_written(self) -> None:
        """Somebody else wrote the weights: let the optimizer's masters follow."""
        self.experts.weights_were_written()
        self.optimizer.refresh_masters()

    def step(self, step: int, source: TokenSource, *, timed: bool = False) -> StepResult:
        """Optimizer step number `step`, counted from 0. A collective over the world.

        `timed` waits for a GPU behind every action, so that spans say what it did and not only
        when it was told to. Raises RunError on a gradient that is not finite, before the weights
        move.
        """
        assert self._shelf is None, "optimizer state is away"
        started = time.perf_counter()
        self.meter.begin()
        crossed = self._crossed_nodes()
        batches = self.slicer.micro_batches(source, step)
        targets = self._count_targets(batches)
        sums = self.executor.run(self.schedule, batches, self._objective(targets), timed=timed)
        crossed = self._crossed_nodes() - crossed
        if self.layout.experts == 1:
            self.meter.rows.update(sums.loads)  # all experts are here, each in its slot
        work = self.meter.take()
        with sums.spans.noted("sum gradients", OPTIMIZER):
            self.experts.send_gradients_home()
            self.optimizer.reduce()
        with sums.spans.noted("clip", OPTIMIZER):
            norm = self._clip(step)
        lr = lr_at(step - self.first_step, self.train.learning_rate())
        with sums.spans.noted("optimizer", OPTIMIZER):
            self.optimizer.step(lr)
            self.experts.take_weights()
        with sums.spans.noted("balance", OPTIMIZER):
            loads = global_loads(sums.loads, self.groups.dense)
            update_biases(self.held.routers(), loads, self.train.gamma_at(step))
        return self._result(sums, work, crossed, targets, loads, norm, lr, started)

    def _crossed_nodes(self) -> int:
        """Bytes that dispatches have sent to other nodes since the groups were formed."""
        if self.nodes is None:
            return 0
        return sum(
            self.nodes.across(self.at.expert, self.exchange.sent_bytes(ways))
            for ways in self.groups.dispatch
        )

    def _count_targets(self, batches: dict[tuple[int, int], MicroBatch]) -> list[int]:
        """Valid targets per depth over all workers."""
        depths = 1 + self.model.num_nextn_predict_layers
        counts_D = torch.zeros(depths, dtype=torch.int64, device=self.device)
        for batch in batches.values():
            if batch.labels_DT is not None:
                counts_D += (batch.labels_DT != IGNORED_LABEL).sum(1)
        dist.all_reduce(counts_D, group=self.groups.world)
        return counts_D.tolist()

    def _objective(self, targets: list[int]) -> Objective:
        share = self.train.mtp_lambda / max(len(targets) - 1, 1)
        return Objective(
            main=1 / max(targets[0], 1),
            mtp=tuple(share / max(count, 1) for count in targets[1:]),
            balance=self.train.sequence_loss_weight() / self.train.global_sequences(self.layout),
            aux=self.train.aux_loss_weight() / self.train.global_micro_batches(self.layout),
        )

    def _clip(self, step: int) -> float:
        """Global gradient norm before clipping; every rank computes the same."""
        squared = self.optimizer.squared_norm()
        dist.all_reduce(squared, group=self.groups.world)
        norm = math.sqrt(float(squared))
        if not math.isfinite(norm):
            raise RunError(
                f"the gradient norm of step {step} is {norm} and must be finite",
                hint="lower train.lr or train.clip_norm and resume from the last checkpoint",
            )
        if 0 < self.train.clip_norm < norm:
            self.optimizer.scale(self.train.clip_norm / norm)
        return norm

    def _result(
        self,
        sums: StepSums,
        work: ExpertWork,
        crossed: int,
        targets: list[int],
        loads: dict[int, Tensor],
        norm: float,
        lr: float,
        started: float,
    ) -> StepResult:
        depths = self.model.num_nextn_predict_layers
        longest_s = torch.tensor(sums.elapsed_s, dtype=torch.float64, device=self.device)
        dist.all_reduce(longest_s, dist.ReduceOp.MAX, group=self.groups.world)
        whole_s = self.layout.world_size * float(longest_s)
        idle_s = float(longest_s) - sums.elapsed_s + sums.waited_s
        shares = [idle_s / whole_s, sums.exposed_s / whole_s]
        totals = torch.tensor(
            [sums.main, *(sums.mtp or [0.0] * depths), sums.balance, *shares],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(totals, group=self.groups.world)
        main, *mtp, balance, bubble, exposed = totals.tolist()
        return StepResult(
            loss=main / max(targets[0], 1),
            mtp_loss=[loss / max(count, 1) for loss, count in zip(mtp, targets[1:])],
            balance_loss=balance,
            grad_norm=norm,
            lr=lr,
            bubble=bubble,
            exposed_communication=exposed,
            step_time_s=time.perf_counter() - started,
            loads={layer: load.tolist() for layer, load in loads.items()},
            max_vio={layer: max_violation(load) for layer, load in loads.items()},
            work=work,
            cross_node_bytes=crossed,
            spans=sums.spans.taken,
        )

    def evaluate(self, source: TokenSource, num_batches: int) -> HeldOut:
        """Cross-entropy of the first `num_batches` global batches of held-out text."""
        schedule = forward_only(self.schedule, self.train.micro_batches)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        nothing = Objective(main=0.0, mtp=(), balance=0.0)
        for number in range(num_batches):
            batches = self.slicer.micro_batches(source, number, "heldout")
            totals[0] += self.executor.run(schedule, batches, nothing).main
            for batch in batches.values():
                if batch.labels_DT is not None:
                    totals[1] += (batch.labels_DT[0] != IGNORED_LABEL).sum()
        dist.all_reduce(totals, group=self.groups.world)
        return HeldOut(loss_sum=float(totals[0]), targets=int(totals[1]))

    def close(self) -> None:
        """Let go of optimizer, threads and process groups; weights stay."""
        self.executor.close()
        self.optimizer.close()
        leave()
