"""Which expert rank holds which routed expert of which layer in which slot, as data.

Dispatch, optimizer, checkpoints and migrations read this map; nothing assumes an arrangement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """`held[layer][rank]` are the logical experts in the slots of an expert rank, homes first.

    It is the same on mirrors and replicas. An expert has one home, which owns its master weights
    and moments: the first `num_homes[layer][rank]` slots of a rank are homes. The others are
    redundant copies, whose gradients are added to the home's and which take their weights from
    it. No rank holds an expert twice. Slots are numbered rank by rank, and ranks may have
    different numbers of them.
    """

    held: Mapping[int, tuple[tuple[int, ...], ...]]
    num_homes: Mapping[int, tuple[int, ...]]

    def __post_init__(self) -> None:
        for layer, ranks in self.held.items():
            homes = [e for rank in range(len(ranks)) for e in self.homes(layer, rank)]
            everything = {expert for experts in ranks for expert in experts}
            assert sorted(homes) == sorted(everything) == list(range(len(homes))), (layer, ranks)
            assert all(len(set(experts)) == len(experts) for experts in ranks), (layer, ranks)

    @property
    def num_ranks(self) -> int:
        return len(next(iter(self.held.values()), ()))

    def homes(self, layer: int, rank: int) -> tuple[int, ...]:
        """Logical experts whose home is on `rank`, in the order of their slots."""
        return self.held[layer][rank][: self.num_homes[layer][rank]]

    def copies(self, layer: int, rank: int) -> tuple[int, ...]:
        """Logical experts of which `rank` has a redundant copy, in the order of their slots."""
        return self.held[layer][rank][self.num_homes[layer][rank] :]

    def slots(self, layer: int) -> list[int]:
        """How many slots each rank has."""
        return [len(experts) for experts in self.held[layer]]

    def home_ranks(self, layer: int) -> dict[int, int]:
        """Rank of every logical expert's home."""
        ranks = range(len(self.held[layer]))
        return {expert: rank for rank in ranks for expert in self.homes(layer, rank)}

    def with_layers(self, layers: Iterable[int], other: ExpertPlacement) -> ExpertPlacement:
        """This one, but `layers` as in `other`."""
        held, num_homes = dict(self.held), dict(self.num_homes)
        for layer in layers:
            held[layer], num_homes[layer] = other.held[layer], other.num_homes[layer]
        return ExpertPlacement(held=held, num_homes=num_homes)

    def slots_of(self, layer: int) -> list[list[int]]:
        """Physical slots of every logical expert, its home first."""
        homes: dict[int, int] = {}
        others: dict[int, list[int]] = {}
        slot = 0
        for rank, experts in enumerate(self.held[layer]):
            for index, expert in enumerate(experts):
                if index < self.num_homes[layer][rank]:
                    homes[expert] = slot
                else:
                    others.setdefault(expert, []).append(slot)
                slot += 1
        return [[homes[expert], *others.get(expert, ())] for expert in range(len(homes))]


def differ_in(layer: int, one: ExpertPlacement, other: ExpertPlacement) -> bool:
    """Whether the layer's experts are not in the same slots."""
    return (one.held[layer], one.num_homes[layer]) != (other.held[layer], other.num_homes[layer])


def to_plain(placement: ExpertPlacement) -> dict[str, Any]:
    """As JSON can hold it; `from_plain` takes it back."""
    return {
        "held": {str(layer): ranks for layer, ranks in placement.held.items()},
        "num_homes": {str(layer): counts for layer, counts in placement.num_homes.items()},
    }


def from_plain(values: Mapping[str, Any]) -> ExpertPlacement:
    held = {int(k): tuple(map(tuple, ranks)) for k, ranks in values["held"].items()}
    num_homes = {int(k): tuple(counts) for k, counts in values["num_homes"].items()}
    return ExpertPlacement(held=held, num_homes=num_homes)


def contiguous_placement(
    config: ModelConfig, num_ranks: int, slots: Sequence[int] = ()
) -> ExpertPlacement:
    """Runs of experts in order, in every MoE layer, and copies where there are more slots.

    `slots` are those of each rank; left out they are equal and none is redundant. Redundant ones
    hold, until somebody knows the loads, other experts of the router groups that the rank has
    experts of, which are on its node if groups are, and behind these the experts that follow.

    Raises ConfigError if the ranks do not divide the experts, or `slots` does not hold them.
    """
    num_experts = config.n_routed_experts
    if not slots and num_experts % num_ranks:
        raise ConfigError(
            f"model.n_routed_experts {num_experts} is not divisible by layout.experts {num_ranks}",
            hint="choose a number of expert ranks that divides the experts, or give experts.slots",
        )
    slots = slots or [num_experts // num_ranks] * num_ranks
    if len(slots) != num_ranks or min(slots) < 1 or sum(slots) < num_experts:
        raise ConfigError(
            f"experts.slots is {list(slots)} and must be {num_ranks} numbers of at least 1, one an "
            f"expert rank, that sum to model.n_routed_experts {num_experts} or more",
            hint="give every expert rank its slots, or leave experts.slots out",
        )
    if max(slots) > num_experts:
        raise ConfigError(
            f"experts.slots is {list(slots)} and no rank can use more slots than there are experts "
            f"({num_experts})",
            hint="lower the largest",
        )
    ends = [num_experts * sum(slots[: r + 1]) // sum(slots) for r in range(num_ranks)]
    starts = [0, *ends[:-1]]
    homes = tuple(end - start for start, end in zip(starts, ends))
    ranks = tuple(
        (*range(start, end), *_neighbours(config, start, end)[: count - (end - start)])
        for start, end, count in zip(starts, ends, slots)
    )
    return ExpertPlacement(
        held=dict.fromkeys(config.moe_layers, ranks),
        num_homes=dict.fromkeys(config.moe_layers, homes),
    )


def _neighbours(config: ModelConfig, start: int, end: int) -> list[int]:
    """All experts but [start, end), those of the same router groups first."""
    num_experts = config.n_routed_experts
    size = num_experts // config.n_group
    others = [expert % num_experts for expert in range(end, start + num_experts)]
    own = {expert // size for expert in range(start, end)}
    return sorted(others, key=lambda expert: expert // size not in own)
