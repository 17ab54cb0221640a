"""What the balancer answers: where experts should live, what that gains and costs, as data."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.parallel.expert_moves import ExpertMove
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """The best that was found for one layer, whether or not it repays its moving."""

    layer: int
    imbalance_before: float
    """Slowest rank's time over the time if load were spread by speed; 1.0 is perfect."""
    imbalance_after: float
    seconds_before: float
    """Foreseen time of the layer's slowest rank in a step, all passes."""
    seconds_after: float
    cost_s: float
    """Seconds that moving this layer's experts takes."""
    num_bytes: int
    """Bytes that travel for it."""
    moves: tuple[ExpertMove, ...]
    moved: bool
    """Whether the proposal changes this layer."""

    @property
    def gain_s(self) -> float:
        """Seconds a step."""
        return self.seconds_before - self.seconds_after


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What to do now. Layers that would not repay their moving stay as they are."""

    adopt: bool
    reason: str
    """One sentence for the log."""
    note: str
    """What a person should know about the policy; empty if nothing."""
    placement: ExpertPlacement
    """The new placement if `adopt`, else the present one."""
    layers: tuple[LayerChange, ...]
    """Of every layer whose load was seen, moved or not."""

    @property
    def moved_layers(self) -> tuple[int, ...]:
        return tuple(change.layer for change in self._moved)

    @property
    def moves(self) -> tuple[ExpertMove, ...]:
        """Of all moved layers, by layer, target and expert."""
        return tuple(move for change in self._moved for move in change.moves)

    @property
    def gain_s(self) -> float:
        """Seconds a step, all moved layers together."""
        return sum(change.gain_s for change in self._moved)

    @property
    def cost_s(self) -> float:
        """Seconds if layers move one after the other, without the migration's overhead."""
        return sum(change.cost_s for change in self._moved)

    @property
    def num_bytes(self) -> int:
        """Bytes that travel, counted once however many mirrors and replicas do it."""
        return sum(change.num_bytes for change in self._moved)

    @property
    def imbalance_before(self) -> float:
        """Of the worst layer."""
        return max((change.imbalance_before for change in self.layers), default=1.0)

    @property
    def imbalance_after(self) -> float:
        """Of the worst layer, moved or not."""
        after = [c.imbalance_after if c.moved else c.imbalance_before for c in self.layers]
        return max(after, default=1.0)

    @property
    def _moved(self) -> list[LayerChange]:
        return [change for change in self.layers if change.moved]
