"""When experts move, and where to: only if the time saved repays the moving.

The slowest expert rank of a layer determines the layer's time. For every layer the balancer
compares a new placement, made from the foreseen loads and the ranks' measured speeds, with the
present one improved in place, and takes what saves most until the next look after its moving is
paid. Layers that would not gain stay. Nothing here communicates: equal observations give equal
proposals.

Shape suffixes: L layers, E experts, R expert ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from dualray.parallel.candidates import Ranks, candidates
from dualray.parallel.expert_moves import MoveCost, moves_between
from dualray.parallel.load_forecast import LatestSpeeds, LoadForecast
from dualray.parallel.placement import Floats, policy_note
from dualray.parallel.proposal import LayerChange, Proposal
from dualray.parallel.settle import Contents, with_homes
from dualray.parallel.slots import ExpertPlacement

TRAINING_PASSES = 3
"""Forward, input gradients and weight gradients cost about the same each."""
SERVING_PASSES = 1

SPEED_TOLERANCE = 0.1
"""Ranks whose measured speeds are nearer than that, relative, count as equally fast."""


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """What a gain is worth: how long it lasts, and what it has to repay."""

    steps: int
    """Steps until the next look."""
    passes: int
    """TRAINING_PASSES or SERVING_PASSES."""
    sharers: int = 1
    """Workers among which a rank's counted rows are divided: replicas x mirrors, if loads are
    counted over all of them."""
    cost: MoveCost


class Balancer:
    """Watches loads and speeds step by step, and says now and then where experts should live."""

    def __init__(
        self,
        *,
        slots: Sequence[int],
        nodes: Sequence[int],
        num_groups: int,
        decay: float = 0.9,
        min_gain: float = 0.02,
        speed_tolerance: float = SPEED_TOLERANCE,
    ) -> None:
        """slots, nodes: of every expert rank; all nodes equal, or num_groups 1, places experts
        without regard to nodes. num_groups: the model's n_group. decay: of the moving average of
        loads. min_gain: share of a layer's time that a change must save.
        """
        assert len(slots) == len(nodes)
        self.note = policy_note(num_groups, len(set(nodes))) if num_groups > 1 else ""
        self._slots, self._nodes = tuple(slots), tuple(nodes)
        self._num_groups = num_groups
        self._min_gain, self._tolerance = min_gain, speed_tolerance
        self._loads = LoadForecast(decay=decay)
        self._speeds = LatestSpeeds(len(slots))

    def observe(
        self, loads: Mapping[int, ArrayLike], rows_per_s: Sequence[float | None] | None = None
    ) -> None:
        """Take in one step: tokens per expert [E] by layer, and what is known by now of the rows
        a second of each rank in a forward pass (None for one that had none to measure).

        Raises RunError for numbers that cannot be; nothing of the step is then taken in.
        """
        if rows_per_s is not None:
            self._speeds.checked(rows_per_s)
        self._loads.observe(loads)
        if rows_per_s is not None:
            self._speeds.observe(rows_per_s)

    def consider(
        self, placement: ExpertPlacement, horizon: Horizon, *, rows_per_s: float
    ) -> Proposal:
        """What to do now. rows_per_s: what ranks are taken to do while none was measured.

        Raises ConfigError if the ranks' slots cannot hold the experts.
        """
        assert placement.num_ranks == len(self._slots)
        forecast = self._loads.predict()
        layers = [layer for layer in sorted(placement.held) if layer in forecast]
        if not layers:
            return self._stay(placement, (), "no load has been seen yet")
        speed_R = self._speeds.predict(otherwise=rows_per_s, tolerance=self._tolerance)
        ranks = Ranks(
            slots=self._slots,
            nodes=self._nodes,
            speeds=tuple(speed_R.tolist()),
            num_groups=self._num_groups,
        )
        load_LE = np.stack([forecast[layer] for layer in layers])
        held, num_homes = dict(placement.held), dict(placement.num_homes)
        changes = []
        arranged = candidates(load_LE, layers, placement, ranks, horizon.cost)
        for layer, load_E, found in zip(layers, load_LE, arranged):
            options = [
                self._weigh(layer, load_E, contents, placement, ranks, horizon)
                for contents in found
            ]
            change, new = max(
                options, key=lambda option: (option[0].moved, _net(option[0], horizon))
            )
            changes.append(change)
            if change.moved:
                held[layer], num_homes[layer] = new.held[layer], new.num_homes[layer]
        return self._decide(
            placement, ExpertPlacement(held=held, num_homes=num_homes), changes, horizon
        )

    def _weigh(
        self,
        layer: int,
        load_E: Floats,
        contents: Contents,
        placement: ExpertPlacement,
        ranks: Ranks,
        horizon: Horizon,
    ) -> tuple[LayerChange, ExpertPlacement]:
        held, num_homes = with_homes(contents, placement.home_ranks(layer))
        new = ExpertPlacement(held={layer: held}, num_homes={layer: num_homes})
        moves = moves_between(placement, new, layer)
        before, after = (
            float((rank_loads(load_E, parts) / ranks.speeds).max())
            for parts in (placement.held[layer], held)
        )
        even = float(load_E.sum()) / sum(ranks.speeds)
        scale = horizon.passes / horizon.sharers
        change = LayerChange(
            layer=layer,
            imbalance_before=before / even if even else 1.0,
            imbalance_after=after / even if even else 1.0,
            seconds_before=before * scale,
            seconds_after=after * scale,
            cost_s=horizon.cost.seconds(moves),
            num_bytes=horizon.cost.size(moves),
            moves=tuple(moves),
            moved=False,
        )
        enough = change.gain_s > 0 and change.gain_s >= self._min_gain * change.seconds_before
        return replace(change, moved=enough and _net(change, horizon) > 0), new

    def _decide(
        self,
        old: ExpertPlacement,
        new: ExpertPlacement,
        changes: list[LayerChange],
        horizon: Horizon,
    ) -> Proposal:
        moved = [change for change in changes if change.moved]
        stays = tuple(replace(change, moved=False) for change in changes)
        if not moved:
            best = max(changes, key=lambda change: _net(change, horizon))
            if best.gain_s <= 0:
                return self._stay(old, stays, "no layer would be faster with its experts elsewhere")
            return self._stay(
                old,
                stays,
                f"layer {best.layer} would gain most, {best.gain_s:.2g} s of "
                f"{best.seconds_before:.2g} s a step, which over {horizon.steps} steps is not "
                f"worth moving for {best.cost_s:.2g} s",
            )
        gain_s = sum(change.gain_s for change in moved) * horizon.steps
        cost_s = sum(change.cost_s for change in moved) + horizon.cost.overhead_s
        if gain_s <= cost_s:
            return self._stay(
                old,
                stays,
                f"{len(moved)} of {len(changes)} layers would save {gain_s:.2g} s in "
                f"{horizon.steps} steps and take {cost_s:.2g} s to move",
            )
        return Proposal(
            adopt=True,
            reason=f"{len(moved)} of {len(changes)} layers move for {cost_s:.2g} s and save "
            f"{gain_s:.2g} s in {horizon.steps} steps",
            note=self.note,
            placement=new,
            layers=tuple(changes),
        )

    def _stay(
        self, placement: ExpertPlacement, layers: tuple[LayerChange, ...], reason: str
    ) -> Proposal:
        return Proposal(
            adopt=False, reason=reason, note=self.note, placement=placement, layers=layers
        )


def rank_loads(load_E: Floats, parts: Contents) -> Floats:
    """Load of every rank [R] if an expert's is split evenly over its copies.

    parts: the experts of each rank, such as `ExpertPlacement.held[layer]`.
    """
    expert_S = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    rank_S = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    share_E = load_E / np.bincount(expert_S, minlength=len(load_E))
    loads_R = np.bincount(rank_S, share_E[expert_S], minlength=len(parts))
    return loads_R.astype(np.float64)


def _net(change: LayerChange, horizon: Horizon) -> float:
    """Seconds that are left of the gain once the moving is paid."""
    return change.gain_s * horizon.steps - change.cost_s
