"""Where each worker sits: replicas x pipeline x experts, and who shares what with whom.

World rank = (replica * pipeline + pipeline_rank) * experts + expert_rank. Everything else
(process groups, slices of the batch, owners of parameters) follows from a `Coordinate`
and the schedule's stage map; nothing caches a rank anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualray.errors import ConfigError
from dualray.schedule.actions import Schedule


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks of each kind there are, and the schedule that drives them."""

    pipeline: int = 1
    """Pipeline ranks."""
    experts: int = 1
    """Expert ranks; they are data-parallel to each other outside the routed experts."""
    replicas: int = 1
    """Copies of the whole pipeline x experts grid."""
    schedule: str = ""
    """`dualpipe`, `dualpipev`, `zb1p`, `1f1b` or `gpipe`; unset it is dualpipe for an even
    pipeline, else 1f1b. `auto` starts with that and lets the scheduler decide by measured costs."""
    layers: tuple[int, ...] = ()
    """Layers of each stage in the model's order; unset they are nearly equal. dualpipev has two
    stages a pipeline rank, the others one."""

    def __post_init__(self) -> None:
        if not self.schedule:
            object.__setattr__(self, "schedule", self._default_schedule)
        for field in ("pipeline", "experts", "replicas"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"layout.{field} is {getattr(self, field)} and must be at least 1",
                    hint=f"set layout.{field} to 1 or more",
                )

    @property
    def _default_schedule(self) -> str:
        return "1f1b" if self.pipeline % 2 else "dualpipe"

    @property
    def concrete(self) -> Layout:
        """The layout that a run starts with: itself, unless the scheduler is to decide."""
        return replace(self, schedule=self._default_schedule) if self.is_open else self

    @property
    def is_open(self) -> bool:
        """Whether the scheduler decides."""
        return self.schedule == "auto"

    @property
    def world_size(self) -> int:
        return self.replicas * self.pipeline * self.experts

    def rank(self, at: Coordinate) -> int:
        return (at.replica * self.pipeline + at.pipeline) * self.experts + at.expert

    def coordinate(self, rank: int) -> Coordinate:
        rest, expert = divmod(rank, self.experts)
        replica, pipeline = divmod(rest, self.pipeline)
        return Coordinate(replica=replica, pipeline=pipeline, expert=expert)


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """One worker's place in the layout."""

    replica: int
    pipeline: int
    expert: int


def holders(layout: Layout, schedule: Schedule, stage: int) -> tuple[int, ...]:
    """Pipeline ranks that hold `stage`: two mirrors under DualPipe, else one."""
    return tuple(p for p in range(layout.pipeline) if stage in schedule.stage_of[p])


def dense_ranks(layout: Layout, schedule: Schedule, stage: int) -> tuple[int, ...]:
    """World ranks that hold the dense parameters of `stage`, ascending."""
    return tuple(
        layout.rank(Coordinate(replica=r, pipeline=p, expert=e))
        for r in range(layout.replicas)
        for p in holders(layout, schedule, stage)
        for e in range(layout.experts)
    )


def expert_ranks(layout: Layout, schedule: Schedule, stage: int, expert: int) -> tuple[int, ...]:
    """World ranks that hold expert rank `expert`'s routed experts of `stage`, ascending."""
    return tuple(
        layout.rank(Coordinate(replica=r, pipeline=p, expert=expert))
        for r in range(layout.replicas)
        for p in holders(layout, schedule, stage)
    )
