"""What one walk of a schedule is given, micro-batch by micro-batch, and what it measures.

T tokens, D MTP depths.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dualray.model.stage import Losses
from dualray.parallel.spans import Spans


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro-batch as this worker sees it.

    `ids_T` is present where the direction enters, `labels_DT` (1 + MTP depths, T) where it
    ends; both are None in between.
    """

    positions_T: Tensor
    seq_lens: tuple[int, ...]
    ids_T: Tensor | None
    labels_DT: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Factors that turn sums into the step's loss: one over the global count of targets.

    `mtp[k]` already contains lambda / D. `balance` is alpha over the global number of
    sequences, the routing imbalance's share; `aux` the auxiliary loss' weight over the global
    number of micro-batches.
    """

    main: float
    mtp: tuple[float, ...]
    balance: float
    aux: float = 0.0

    def of(self, losses: Losses) -> Tensor:
        total = losses.main * self.main
        for scale, loss in zip(self.mtp, losses.mtp):
            total = total + loss * scale
        return total


@dataclass(kw_only=True)
class StepSums:
    """What one walk measured on this worker. Sums in nats; seconds of wall time."""

    main: float = 0.0
    mtp: list[float] = field(default_factory=list)
    balance: float = 0.0
    loads: dict[int, Tensor] = field(default_factory=dict)
    spans: Spans = field(default_factory=Spans)
    elapsed_s: float = 0.0
    waited_s: float = 0.0
    """Of it, waiting for other pipeline ranks."""
    exposed_s: float = 0.0
    """Of it, waiting for rows on their way between expert ranks, with nothing to compute."""
