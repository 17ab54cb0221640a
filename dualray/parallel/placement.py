"""Which expert rank holds which routed expert, as data.

Dispatch, optimizer and checkpoints read this map; nothing assumes an arrangement.
"""

from __future__ import annotations

from dataclasses import dataclass

from dualray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """`held[rank]` are the logical experts in the slots of expert rank `rank`, in order.

    Slots are numbered rank by rank: physical slot = rank * slots_per_rank + slot.
    """

    held: tuple[tuple[int, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.held)

    @property
    def slots_per_rank(self) -> int:
        return len(self.held[0])

    def physical_slots(self) -> list[int]:
        """Physical slot of every logical expert."""
        where = {
            expert: rank * self.slots_per_rank + slot
            for rank, experts in enumerate(self.held)
            for slot, expert in enumerate(experts)
        }
        return [where[expert] for expert in range(len(where))]


def contiguous_placement(num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Equal runs of experts in order. Raises ConfigError if they do not divide."""
    if num_experts % num_ranks:
        raise ConfigError(
            f"model.n_routed_experts {num_experts} is not divisible by layout.experts {num_ranks}",
            hint="choose a number of expert ranks that divides the experts",
        )
    share = num_experts // num_ranks
    return ExpertPlacement(
        held=tuple(tuple(range(r * share, (r + 1) * share)) for r in range(num_ranks))
    )
