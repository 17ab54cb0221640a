"""Section `experts` of a run file: where routed experts live, and how tokens get to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig
from dualray.parallel.layout import Layout
from dualray.parallel.nodes import NodeMap
from dualray.parallel.slots import ExpertPlacement, contiguous_placement, from_plain

DISPATCHES = ("auto", "flat", "node_limited")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Slots of the expert ranks, when experts move, and what carries tokens to them."""

    redundant: int = 0
    """Slots of a layer beyond one for each expert, spread evenly over the expert ranks; they hold
    second and further copies of the experts with most tokens."""
    slots: tuple[int, ...] = ()
    """Slots of a layer on each expert rank, for ranks of unequal size; instead of `redundant`."""
    rebalance_every: int = 0
    """Optimizer steps between looks at the loads, after which experts may move; 0 never moves."""
    serve_rebalance_every: int = 0
    """The same in serving, in engine steps."""
    load_decay: float = 0.9
    """Share that the moving average of loads keeps from step to step, 0 to below 1."""
    min_gain: float = 0.02
    """Share of the experts' time that a new placement must be foreseen to save."""
    link_bytes_per_s: float = 1e9
    """Rate at which weights move between workers, until migrations have measured it."""
    dispatch: str = "auto"
    """`flat` sends a row for every choice; `node_limited` sends a token to a node once and fans it
    out there; `auto` is node_limited where the expert ranks of a stage are on several nodes."""
    ranks_per_node: int | None = None
    """Expert ranks that count as one node; None asks Ray where the workers are."""
    fp8_dispatch: bool = False
    """Send tokens, and gradients of results, to the experts in FP8 (tiles of 1 x 128, arXiv
    2412.19437, 3.3.3); results come back in train.dtype."""

    def __post_init__(self) -> None:
        for field in ("redundant", "rebalance_every", "serve_rebalance_every"):
            self._check(field, getattr(self, field) >= 0, "at least 0", 0)
        self._check("load_decay", 0 <= self.load_decay < 1, "at least 0 and below 1", 0.9)
        self._check("min_gain", 0 <= self.min_gain < 1, "at least 0 and below 1", 0.02)
        finite = 0 < self.link_bytes_per_s < math.inf
        self._check("link_bytes_per_s", finite, "above 0", 1e9)
        known = self.dispatch in DISPATCHES
        self._check("dispatch", known, f"one of {', '.join(DISPATCHES)}", "auto")
        if self.ranks_per_node is not None:
            self._check("ranks_per_node", self.ranks_per_node >= 1, "at least 1", "null")
        if self.slots and self.redundant:
            raise ConfigError(
                f"experts.slots is {list(self.slots)} and experts.redundant is {self.redundant}, "
                "and slots already say how many are redundant",
                hint="give one of the two",
            )

    def _check(self, field: str, holds: bool, rule: str, default: object) -> None:
        if not holds:
            raise ConfigError(
                f"experts.{field} is {getattr(self, field)} and must be {rule}",
                hint=f"set experts.{field} to {default}",
            )

    def first_placement(self, model: ModelConfig, layout: Layout) -> ExpertPlacement:
        """Where experts are before anybody knows their loads.

        Raises ConfigError if the slots do not hold the experts, or nothing can move.
        """
        ranks = layout.experts
        self._refuse_single_rank(ranks)
        if self.ranks_per_node is not None and ranks % self.ranks_per_node:
            raise ConfigError(
                f"experts.ranks_per_node {self.ranks_per_node} does not divide layout.experts "
                f"{ranks}",
                hint="choose a divisor, or leave it out to count Ray's nodes",
            )
        most = model.n_routed_experts * (ranks - 1)
        if self.redundant > most:
            raise ConfigError(
                f"experts.redundant is {self.redundant} and {ranks} expert ranks that all have all "
                f"{model.n_routed_experts} experts have {most} redundant ones",
                hint=f"set experts.redundant to at most {most}",
            )
        total = model.n_routed_experts + self.redundant
        if self.redundant and total % ranks:
            raise ConfigError(
                f"model.n_routed_experts {model.n_routed_experts} and experts.redundant "
                f"{self.redundant} are {total} slots, which layout.experts {ranks} does not divide",
                hint=f"set experts.redundant to {self.redundant + ranks - total % ranks}, or give "
                "experts.slots",
            )
        slots = self.slots or (total // ranks,) * ranks if self.redundant or self.slots else ()
        return contiguous_placement(model, ranks, slots)

    def placement_after(
        self, remembered: Mapping[str, Any] | None, model: ModelConfig, layout: Layout
    ) -> tuple[ExpertPlacement, str]:
        """What a checkpoint remembers, if the ranks have such slots now; else the first one, and a
        word about it."""
        first = self.first_placement(model, layout)
        if remembered is None:
            return first, ""
        placement = from_plain(remembered)
        same = placement.held.keys() == first.held.keys() and all(
            placement.slots(layer) == first.slots(layer) for layer in first.held
        )
        if same:
            return placement, ""
        return first, (
            "the checkpoint's experts lived in other slots than these ranks have, so where they "
            "had moved to is forgotten"
        )

    def nodes_of(self, layout: Layout, hosts: Sequence[str]) -> tuple[NodeMap | None, str]:
        """Which expert ranks of a stage are on one node, and a word if that cannot be used.

        `hosts[r]` is the node of world rank r. None if all are on one, or if stages or replicas lie
        differently on their nodes.
        """
        if layout.experts == 1:
            return None, ""
        if self.ranks_per_node is not None:
            maps = {NodeMap.of([rank // self.ranks_per_node for rank in range(layout.experts)])}
        else:
            ranks = range(0, layout.world_size, layout.experts)
            maps = {NodeMap.of(hosts[first : first + layout.experts]) for first in ranks}
        if len(maps) > 1:
            return None, (
                "the expert ranks of stages and replicas lie differently on their nodes, so a row "
                "is sent for every choice and placement does not look at nodes"
            )
        (nodes,) = maps
        if nodes.num_nodes > 1:
            return nodes, ""
        if self.dispatch == "node_limited":
            return None, (
                "experts.dispatch is node_limited and the expert ranks of a stage are on one node, "
                "so a row is sent for every choice"
            )
        return None, ""

    def _refuse_single_rank(self, ranks: int) -> None:
        if ranks > 1:
            return
        for field in (
            "redundant", "slots", "rebalance_every", "serve_rebalance_every", "ranks_per_node"
        ):  # fmt: skip
            if value := getattr(self, field):
                raise ConfigError(
                    f"experts.{field} is {value} and layout.experts is 1, where every worker has "
                    "all experts of its stages",
                    hint=f"raise layout.experts, or remove experts.{field}",
                )
        if self.fp8_dispatch or self.dispatch == "node_limited":
            field = "fp8_dispatch" if self.fp8_dispatch else "dispatch"
            raise ConfigError(
                f"experts.{field} is {getattr(self, field)} and layout.experts is 1, where no "
                "token is sent to an expert",
                hint=f"raise layout.experts, or remove experts.{field}",
            )
