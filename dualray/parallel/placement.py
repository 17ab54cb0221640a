"""Which expert rank holds which routed expert of which layer, as data.

Dispatch, optimizer and checkpoints read this map; nothing assumes an arrangement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """`held[layer][rank]` are the logical experts in the slots of an expert rank, in order.

    It is the same on mirrors and replicas. Slots are numbered rank by rank: physical slot =
    rank * slots_per_rank + slot. An expert's home is its first physical slot.
    """

    held: Mapping[int, tuple[tuple[int, ...], ...]]

    def slots_per_rank(self, layer: int) -> int:
        return len(self.held[layer][0])

    def home_slots(self, layer: int) -> list[int]:
        """Physical slot of every logical expert of `layer`."""
        homes: dict[int, int] = {}
        for rank, experts in enumerate(self.held[layer]):
            for slot, expert in enumerate(experts):
                homes.setdefault(expert, rank * self.slots_per_rank(layer) + slot)
        return [homes[expert] for expert in range(len(homes))]


def contiguous_placement(config: ModelConfig, num_ranks: int) -> ExpertPlacement:
    """Equal runs of experts in order, in every MoE layer.

    Raises ConfigError if the ranks do not divide the experts.
    """
    num_experts = config.n_routed_experts
    if num_experts % num_ranks:
        raise ConfigError(
            f"model.n_routed_experts {num_experts} is not divisible by layout.experts {num_ranks}",
            hint="choose a number of expert ranks that divides the experts",
        )
    share = num_experts // num_ranks
    ranks = tuple(tuple(range(r * share, (r + 1) * share)) for r in range(num_ranks))
    return ExpertPlacement(held=dict.fromkeys(config.moe_layers, ranks))
