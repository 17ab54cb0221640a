"""The schedules DualPipe is measured against: one direction, one stage a rank."""

from __future__ import annotations

from dualray.schedule.actions import Action, Kind, Schedule, Step


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B: warm up with P-1-rank forwards, then alternate, then drain (arXiv 1806.03377).

    A rank holds at most P-rank live micro-batches. One rank runs F, B per micro-batch.
    """
    assert min(num_ranks, num_micro_batches) >= 1, (num_ranks, num_micro_batches)
    ranks = range(num_ranks)
    return Schedule(
        kind="1f1b",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        steps=tuple(_rank_steps(num_ranks - 1 - rank, num_micro_batches) for rank in ranks),
        stage_of=tuple((rank,) for rank in ranks),
        max_activations=tuple(min(num_ranks - rank, num_micro_batches) for rank in ranks),
        max_deferred=tuple(0 for _ in ranks),
    )


def _rank_steps(ranks_after: int, num_micro_batches: int) -> tuple[Step, ...]:
    warm_up = min(ranks_after, num_micro_batches)
    steps: list[Step] = [Action(Kind.FORWARD, 0, m) for m in range(warm_up)]
    for m in range(num_micro_batches):
        if warm_up + m < num_micro_batches:
            steps.append(Action(Kind.FORWARD, 0, warm_up + m))
        steps.append(Action(Kind.BACKWARD, 0, m))
    return tuple(steps)
