"""Where a run's experts live while it trains: what the balancer decides is done and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dualray.actors.gang import Gang
from dualray.actors.stage_worker import WorkerInfo
from dualray.errors import ConfigError
from dualray.parallel.layout import Layout, holders
from dualray.parallel.nodes import NodeMap
from dualray.parallel.proposal import Proposal
from dualray.parallel.rebalancing import Rebalancing, rank_imbalance
from dualray.parallel.slots import ExpertPlacement, to_plain
from dualray.parallel.step_result import StepResult
from dualray.platform.events import EventLog, Note
from dualray.platform.metrics import ExpertsMoved
from dualray.platform.metrics_log import MetricsLog
from dualray.platform.run_file import RunFile
from dualray.platform.scheduling.choice import Choice, Situation
from dualray.platform.scheduling.memory import worker_bytes
from dualray.schedule.actions import Schedule
from dualray.schedule.make import make_schedule

_GB = 1e9


class ExpertMoves:
    """The experts of a gang that trains."""

    def __init__(
        self,
        run: RunFile,
        gang: Gang,
        events: EventLog,
        log: MetricsLog,
        *,
        placement: ExpertPlacement,
        nodes: NodeMap | None,
    ) -> None:
        """`placement` is where experts are now, `nodes` where expert ranks are if that matters."""
        self._run, self._gang, self._events, self._log = run, gang, events, log
        self._nodes = nodes
        self.placement = placement
        self._divided: tuple[Layout, int] | None = None
        self._rebalancing: Rebalancing | None = None
        self._last_step = run.phases()[-1].end_step
        self._noted = False

    @property
    def remembered(self) -> dict[str, Any]:
        """What a checkpoint says, so that a resumed run goes on alike."""
        return to_plain(self.placement)

    def found_at(self, placement: ExpertPlacement) -> None:
        """Experts live there now: they have moved while the run served."""
        if placement != self.placement:
            self.placement, self._rebalancing = placement, None

    def after(
        self, results: Sequence[StepResult], step: int, layout: Layout, schedule: Schedule
    ) -> None:
        """A step is done, in this layout; perhaps experts move.

        Another schedule divides rows among other workers, or into another number of forwards, so
        what was foreseen is forgotten.
        """
        if not self._run.experts.rebalance_every:
            return
        divided = layout, schedule.num_micro_batches
        if self._rebalancing is None or divided != self._divided:
            self._divided = divided
            self._rebalancing = rebalancing_of(
                self._run,
                layout,
                schedule,
                self.placement,
                self._nodes,
                trains=True,
                has_state=True,
            )
        left = self._last_step - step
        proposal = self._rebalancing.saw([each.work for each in results], step=step, left=left)
        if proposal is not None:
            self._carry_out(proposal, step)

    def _carry_out(self, proposal: Proposal, step: int) -> None:
        note = f"; {proposal.note}" if proposal.note and not self._noted else ""
        self._noted = True
        if not proposal.adopt:
            self._events.append(Note(f"experts after step {step}: stay, {proposal.reason}{note}"))
            return
        assert self._rebalancing is not None
        moved = self._gang.call("move_experts", proposal.placement)
        self.placement = proposal.placement
        self._rebalancing.moved(proposal.placement, moved)
        event = ExpertsMoved(
            step=step,
            layers=proposal.moved_layers,
            imbalance_before=proposal.imbalance_before,
            imbalance_after=proposal.imbalance_after,
            num_bytes=sum(each.received_bytes for each in moved),
            seconds=max(each.seconds for each in moved),
            reason=proposal.reason,
        )
        self._log.append(event)
        self._events.append(
            Note(
                f"experts after step {step}: {proposal.reason}; slowest rank of a layer "
                f"{event.imbalance_before:.2f} of the mean, {event.imbalance_after:.2f} foreseen; "
                f"{event.num_bytes / 1e6:.1f} MB moved in {event.seconds:.2f} s{note}"
            )
        )


def imbalance(layout: Layout, results: Sequence[StepResult]) -> float | None:
    """Rows of the fullest expert rank over the mean, in the worst layer; None without experts."""
    return max(rank_imbalance(layout, [each.work for each in results]).values(), default=None)


def rebalancing_of(
    run: RunFile,
    layout: Layout,
    schedule: Schedule,
    placement: ExpertPlacement,
    nodes: NodeMap | None,
    *,
    trains: bool,
    has_state: bool,
) -> Rebalancing:
    return Rebalancing(
        run.experts,
        run.model,
        layout,
        schedule,
        placement,
        nodes=nodes,
        dtype=getattr(torch, run.train.dtype),
        trains=trains,
        has_state=has_state,
    )


def refuse_too_many_copies(
    run: RunFile, layout: Layout, choice: Choice, infos: Sequence[WorkerInfo]
) -> None:
    """Raises ConfigError if redundant experts do not fit into the workers' memory.

    Without any nothing is foreseen: what fits is then for the planner to say.
    """
    placement = run.experts.first_placement(run.model, layout)
    most = max(
        (len(placement.copies(layer, rank)) for layer in placement.held
         for rank in range(layout.experts)),
        default=0,
    )  # fmt: skip
    if not most:
        return
    schedule = make_schedule(choice.schedule, layout.pipeline, choice.micro_batches)
    memory = memory_bytes(infos)
    situation = Situation(
        model=run.model,
        layout=layout,
        seq_len=run.train.seq_len,
        dtype=run.train.dtype,
        recompute=run.train.recompute,
        memory_bytes=memory,
    )
    dtype = getattr(torch, run.train.dtype)
    stages = max(len(held) for held in schedule.stage_of)
    layers = min(len(placement.held), stages * max(choice.layers))
    numel = 3 * run.model.hidden_size * run.model.moe_intermediate_size
    copies = most * layers * numel * (dtype.itemsize + max(dtype.itemsize, 4))
    if run.train.optimizer == "zero1" and layout.replicas * len(holders(layout, schedule, 0)) > 1:
        # What ZeRO-1 moves lies in a buffer of its own, so homes beside copies exist twice.
        homes = max(max(counts) for counts in placement.num_homes.values())
        copies += homes * layers * numel * dtype.itemsize
    others = worker_bytes(choice, situation, schedule)
    if copies + others > memory:
        raise ConfigError(
            f"redundant experts (experts.redundant, experts.slots) take {copies / _GB:.3g} GB of a "
            f"worker beside {others / _GB:.3g} GB for everything else, and it has "
            f"{memory / _GB:.3g} GB",
            hint="have fewer redundant experts, or more expert ranks",
        )


def memory_bytes(infos: Sequence[WorkerInfo]) -> float:
    """What the worker with the least memory may fill; workers of a node share the node's."""
    nodes = [info.node for info in infos]
    return min(
        info.memory_bytes / (1 if info.has_device else nodes.count(info.node)) for info in infos
    )
