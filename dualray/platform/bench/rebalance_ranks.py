"""What each worker of the rebalancing benchmark does: three trainings in turn, round after round.

Ranks share cores here that in earnest are their own. So the benchmark times experts by what their
thread computed and not by the clock on the wall, and the balancer hears of that: on a core of its
own a thread computes all the time, and both are one. Wall times are kept beside it.

D model, N rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.model.moe import Experts
from dualray.parallel.expert_groups import Moved
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.groups import Rendezvous, host_rendezvous
from dualray.parallel.layout import Layout
from dualray.parallel.proposal import Proposal
from dualray.parallel.rebalancing import Rebalancing
from dualray.parallel.slots import ExpertPlacement
from dualray.parallel.step_result import StepResult
from dualray.parallel.trainer import Trainer
from dualray.platform.bench.ranks import Member
from dualray.platform.bench.rebalance import (
    SLOW_RANK,
    MadeUpTokens,
    RebalanceCase,
    layout,
    skew_routers,
)

STAYS, MOVES, UNEQUAL = TRAININGS = ("stays", "moves", "unequal")
"""No copies and no moves; copies, which the balancer moves; the same with a slower rank, starting
from where `moves` ended."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one worker; rows and seconds by layer, seconds of forwards."""

    loss: float
    step_s: float
    rows: dict[int, int]
    computed_s: dict[int, float]
    """That the thread spent in routed experts."""
    wall_s: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Migration:
    """The balancer's first look, and what its moves took."""

    proposal: Proposal
    moved: tuple[Moved, ...]
    """By rank; empty if experts stayed."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training on one worker."""

    steps: list[Step]
    migration: Migration | None
    second_look: Proposal | None
    """What the balancer would do at the end."""


def measure_rank(member: Member, case: RebalanceCase) -> list[dict[str, Training]]:
    """By round, every training by name."""
    meetings = _meetings(member, case.rounds * len(TRAININGS))
    rounds = []
    for number in range(case.rounds):
        found: dict[str, Training] = {}
        placement: ExpertPlacement | None = None
        for name in TRAININGS:
            hosted, rendezvous = meetings.pop()
            worker = _Worker(
                case,
                case.experts() if name != STAYS else ExpertsConfig(),
                placement if name == UNEQUAL else None,
                slowness=case.slowness if name == UNEQUAL else 1,
                rank=member.rank,
                rendezvous=rendezvous,
                hosted=hosted,
                seed=number,
            )
            found[name] = worker.train()
            placement = worker.trainer.placement
            worker.trainer.close()
        rounds.append(found)
    return rounds


def _meetings(member: Member, count: int) -> list[tuple[dist.TCPStore | None, Rendezvous]]:
    """A meeting place for every training, since groups are formed anew; rank 0 hosts them all."""
    world = member.join_world()
    host = member.rendezvous.host
    opened = [host_rendezvous(host) for _ in range(count)] if member.rank == 0 else []
    stores: list[dist.TCPStore | None] = [store for store, _ in opened] or [None] * count
    ports: list[Any] = [store.port for store, _ in opened] or [None] * count
    dist.broadcast_object_list(ports, src=0, group=world)
    return [(store, replace(member.rendezvous, port=port)) for store, port in zip(stores, ports)]


class _Worker:
    """One rank of one training."""

    def __init__(
        self,
        case: RebalanceCase,
        experts: ExpertsConfig,
        placement: ExpertPlacement | None,
        *,
        slowness: int,
        rank: int,
        rendezvous: Rendezvous,
        hosted: dist.TCPStore | None,
        seed: int,
    ) -> None:
        """Without a placement the first one of `experts`."""
        self.case, self.layout = case, layout()
        model, train = case.model(), case.train()
        self.trainer = Trainer(
            model=model,
            layout=self.layout,
            train=train,
            placement=placement or experts.first_placement(model, self.layout),
            rank=rank,
            rendezvous=rendezvous,
            seed=seed,
            device=_CPU,
            hosted=hosted,
        )
        skew_routers(list(self.trainer.held.routers()), case.skew)
        self.rebalancing = None
        if experts.rebalance_every:
            self.rebalancing = Rebalancing(
                experts,
                model,
                self.layout,
                self.trainer.schedule,
                self.trainer.placement,
                nodes=None,
                dtype=getattr(torch, train.dtype),
                trains=True,
                has_state=True,
            )
        self.slowness = slowness if self.trainer.at.expert == SLOW_RANK else 1
        self.tokens = MadeUpTokens(vocab_size=model.vocab_size, seq_len=case.seq_len)
        self.clock = ThreadClock()
        self._watch(self.trainer.held.experts())

    def train(self) -> Training:
        steps, looks = [], []
        migration: Migration | None = None
        for number in range(self.case.steps):
            result = self.trainer.step(number, self.tokens)
            computed_s = self.clock.take()
            steps.append(_step(result, computed_s))
            if self.rebalancing is None:
                continue
            # Every process decides for itself, and all alike, since all know what each has done.
            works = _gather(replace(result.work, seconds=computed_s), self.layout)
            proposal = self.rebalancing.saw(works, step=number + 1)
            if proposal is None:
                continue
            looks.append(proposal)
            if migration is None:
                migration = self._move(self.rebalancing, proposal)
        second = looks[1] if len(looks) > 1 else None
        return Training(steps=steps, migration=migration, second_look=second)

    def _move(self, rebalancing: Rebalancing, proposal: Proposal) -> Migration:
        if not proposal.adopt:
            return Migration(proposal=proposal, moved=())
        own = self.trainer.move_experts(proposal.placement)
        experts = self.trainer.held.experts()
        self._watch({layer: experts[layer] for layer in own.layers})
        moved = _gather(own, self.layout)
        rebalancing.moved(proposal.placement, moved)
        return Migration(proposal=proposal, moved=tuple(moved))

    def _watch(self, experts: Mapping[int, Experts]) -> None:
        """Of experts that are new: slow them if need be, and time that."""
        for layer, module in experts.items():
            if self.slowness > 1:
                slow_down(module, self.slowness)
            self.clock.watch(layer, module)


def _step(result: StepResult, computed_s: dict[int, float]) -> Step:
    return Step(
        loss=result.loss,
        step_s=result.step_time_s,
        rows={layer: sum(rows) for layer, rows in result.work.slot_rows.items()},
        computed_s=computed_s,
        wall_s=result.work.seconds,
    )


def _gather(own: Any, layout: Layout) -> list[Any]:
    everybody: list[Any] = [None] * layout.world_size
    dist.all_gather_object(everybody, own)
    return everybody


class ThreadClock:
    """Seconds that a thread itself computed in forwards of experts, by layer."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._began = 0.0

    def watch(self, layer: int, experts: Experts) -> None:
        experts.register_forward_pre_hook(lambda *_: self._begin())
        experts.register_forward_hook(lambda *_: self._end(layer))

    def take(self) -> dict[int, float]:
        """Since it was last asked."""
        seconds, self._seconds = self._seconds, {}
        return dict(sorted(seconds.items()))

    def _begin(self) -> None:
        self._began = time.thread_time()

    def _end(self, layer: int) -> None:
        took_s = time.thread_time() - self._began
        self._seconds[layer] = self._seconds.get(layer, 0.0) + took_s


def slow_down(experts: Experts, times: int) -> None:
    """Let these experts compute everything `times` times, forwards and backwards.

    As long as that takes, row for row, on a node that is so many times slower; results are the
    same. Meters that watch the experts see it, since this comes before their hooks.
    """

    def repeat(module: Experts, args: tuple[Any, ...], out_ND: Tensor) -> Tensor:
        rows_ND, offsets, _ = args

        @torch.no_grad()
        def again() -> None:
            for _ in range(times - 1):
                module.forward(rows_ND.detach(), offsets, None)

        again()
        return _Slowed.apply(out_ND, again)

    experts.register_forward_hook(repeat, prepend=True)


class _Slowed(torch.autograd.Function):
    """Does nothing but take longer. A backward has two products where the forward has one."""

    @staticmethod
    def forward(ctx: Any, out_ND: Tensor, again: Callable[[], None]) -> Tensor:
        ctx.again = again
        return out_ND.view_as(out_ND)

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor, None]:
        ctx.again()
        ctx.again()
        return dy_ND, None
