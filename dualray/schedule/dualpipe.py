"""DualPipe: micro-batches enter at both ends of the pipeline (arXiv 2412.19437, 3.2.1).

Rank p holds stage p for direction 0 and stage P-1-p for direction 1. Seen from its own end
every rank does the same, so mirrored ranks walk the same phases with the directions
exchanged.
"""

from __future__ import annotations

from dualray.schedule.actions import Schedule, Step
from dualray.schedule.eight_phases import eight_phases


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The DualPipe schedule; P even, micro-batches even and at least 2P (asserted).

    Every rank holds at most P+1 live micro-batches and, at distance r from its end, r+1
    queued weight gradients.
    """
    assert num_ranks >= 2, num_ranks
    assert num_micro_batches >= 2 * num_ranks, num_micro_batches
    assert num_ranks % 2 == num_micro_batches % 2 == 0, (num_ranks, num_micro_batches)
    ranks = range(num_ranks)
    distances = tuple(min(rank, num_ranks - 1 - rank) for rank in ranks)

    def steps(rank: int) -> tuple[Step, ...]:
        near, far = (0, 1) if rank < num_ranks // 2 else (1, 0)
        return eight_phases(
            distances[rank], num_ranks // 2, num_micro_batches // 2, near=near, far=far
        )

    return Schedule(
        kind="dualpipe",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        steps=tuple(steps(rank) for rank in ranks),
        stage_of=tuple((rank, num_ranks - 1 - rank) for rank in ranks),
        max_activations=(num_ranks + 1,) * num_ranks,
        max_deferred=tuple(distance + 1 for distance in distances),
    )
