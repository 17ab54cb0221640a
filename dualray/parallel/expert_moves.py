"""What has to travel between expert ranks to get from one placement to another, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.parallel.slots import ExpertPlacement


@dataclass(frozen=True, kw_only=True)
class ExpertMove:
    """One expert of one layer from rank to rank, on every mirror and replica alike."""

    layer: int
    expert: int
    source: int
    """Expert rank of the old home."""
    target: int
    weights: bool
    """Weights travel: the target had no copy."""
    state: bool
    """Master weights and moments travel: the home moves to the target."""


@dataclass(frozen=True, kw_only=True)
class MoveCost:
    """What moving costs. While serving there is no state: `state_bytes` is 0."""

    weight_bytes: int
    """Weights of one expert of one layer."""
    state_bytes: int
    """Master weights and both moments of one expert of one layer."""
    sharers: int = 1
    """Mirrors and replicas that state is cut over: each moves its part of it, and all weights."""
    bytes_per_s: float
    """That a rank sends or receives, above 0; ranks move at the same time."""
    overhead_s: float = 0.0
    """Of a migration whatever it moves: groups and buffers that are built anew."""

    def __post_init__(self) -> None:
        if not (self.weight_bytes >= 0 and self.state_bytes >= 0 and self.overhead_s >= 0):
            raise ConfigError(
                f"moving an expert costs {self.weight_bytes} and {self.state_bytes} bytes and "
                f"{self.overhead_s} s, and none of them may be negative",
                hint="give 0 for what does not travel",
            )
        if not self.bytes_per_s > 0:
            raise ConfigError(
                f"experts move at {self.bytes_per_s} bytes a second, which must be above 0",
                hint="measure it, or leave it at its default",
            )

    def size(self, moves: Iterable[ExpertMove]) -> int:
        """Bytes that travel, counted once however many mirrors and replicas do it."""
        return sum(map(self._size, moves))

    def seconds(self, moves: Iterable[ExpertMove]) -> float:
        """Until the busiest rank has sent and received its part, without the overhead."""
        sent, received = Counter[int](), Counter[int]()
        for move in moves:
            # In units of a sharer's part, so that sums stay exact.
            size = self.weight_bytes * self.sharers * move.weights + self.state_bytes * move.state
            sent[move.source] += size
            received[move.target] += size
        most = max([*sent.values(), *received.values()], default=0)
        return most / self.sharers / self.bytes_per_s

    def _size(self, move: ExpertMove) -> int:
        return self.weight_bytes * move.weights + self.state_bytes * move.state


def moves_between(old: ExpertPlacement, new: ExpertPlacement, layer: int) -> list[ExpertMove]:
    """Moves of `layer` from `old` to `new`, by target and expert. All come from the old home."""
    homes = old.home_ranks(layer)
    moves = []
    for target, (before, after) in enumerate(zip(old.held[layer], new.held[layer], strict=True)):
        settled = set(new.homes(layer, target))
        for expert in sorted(after):
            state = expert in settled and homes[expert] != target
            weights = expert not in before
            if state or weights:
                moves.append(
                    ExpertMove(
                        layer=layer,
                        expert=expert,
                        source=homes[expert],
                        target=target,
                        weights=weights,
                        state=state,
                    )
                )
    return moves
