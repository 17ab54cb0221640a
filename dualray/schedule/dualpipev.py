"""DualPipeV: DualPipe folded at its middle, so that no stage is held twice.

P ranks hold 2P stages. Every micro-batch walks down the ranks and, from the last one, back up:
rank p holds stage p on the first leg (direction 0) and stage 2P-1-p on the second (direction
1), and rank 0 has both the input and the loss. Rank p does what DualPipe's rank p of 2P does,
with each leg in the place of a direction.
"""

from __future__ import annotations

from dualray.schedule.actions import Schedule
from dualray.schedule.eight_phases import eight_phases


def dualpipev(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The DualPipeV schedule; at least 1 rank and 2P micro-batches (asserted).

    One rank has nobody to wait for, and still pairs forwards with backwards, so that they can hide
    each other's exchanges between expert ranks.

    Rank p holds at most 2P+1 live micro-batches, counted once a leg, and p+1 queued weight
    gradients.
    """
    assert num_ranks >= 1, num_ranks
    assert num_micro_batches >= 2 * num_ranks, num_micro_batches
    ranks = range(num_ranks)
    return Schedule(
        kind="dualpipev",
        num_ranks=num_ranks,
        num_stages=2 * num_ranks,
        num_micro_batches=num_micro_batches,
        steps=tuple(
            eight_phases(rank, num_ranks, num_micro_batches, near=0, far=1) for rank in ranks
        ),
        stage_of=tuple((rank, 2 * num_ranks - 1 - rank) for rank in ranks),
        max_activations=(2 * num_ranks + 1,) * num_ranks,
        max_deferred=tuple(rank + 1 for rank in ranks),
    )
