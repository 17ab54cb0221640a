"""The schedules DualPipe is measured against: one direction, one stage a rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from dualray.schedule.actions import Action, Kind, Schedule, Step, flatten


def gpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """GPipe: every forward, then every backward in the same order (arXiv 1811.06965).

    A rank holds all micro-batches at once. Idle time is 1F1B's.
    """

    def steps(_: int) -> tuple[Step, ...]:
        return tuple(
            Action(kind, 0, m)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
            for m in range(num_micro_batches)
        )

    held = (num_micro_batches,) * num_ranks
    return _schedule("gpipe", num_ranks, num_micro_batches, steps, held, (0,) * num_ranks)


def one_f_one_b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """1F1B: warm up with P-1-rank forwards, then alternate, then drain (arXiv 1806.03377).

    A rank holds at most P-rank live micro-batches. One rank runs F, B per micro-batch.
    """

    def steps(rank: int) -> tuple[Step, ...]:
        warm_up = min(num_ranks - 1 - rank, num_micro_batches)
        steps: list[Step] = [Action(Kind.FORWARD, 0, m) for m in range(warm_up)]
        for m in range(num_micro_batches):
            if warm_up + m < num_micro_batches:
                steps.append(Action(Kind.FORWARD, 0, warm_up + m))
            steps.append(Action(Kind.BACKWARD, 0, m))
        return tuple(steps)

    held = tuple(min(num_ranks - rank, num_micro_batches) for rank in range(num_ranks))
    return _schedule("1f1b", num_ranks, num_micro_batches, steps, held, (0,) * num_ranks)


def zb1p(num_ranks: int, num_micro_batches: int) -> Schedule:
    """ZB1P, the hand-made ZB-H1: 1F1B with every backward split (arXiv 2401.10241).

    Rank r runs each weight gradient r micro-batches late, so what it holds for live
    micro-batches (P-r) and queued weight gradients (r) together is 1F1B's largest, P. Within
    a turn the newest is queued before the oldest runs: at most r+1.
    """
    plain = one_f_one_b(num_ranks, num_micro_batches)

    def steps(rank: int) -> tuple[Step, ...]:
        steps: list[Step] = []
        late = deque[int]()
        for action in flatten(plain.steps[rank]):
            if action.kind is Kind.FORWARD:
                steps.append(action)
                continue
            steps.append(replace(action, kind=Kind.INPUT_GRAD))
            late.append(action.micro_batch)
            if len(late) > rank:
                steps.append(Action(Kind.WEIGHT_GRAD, 0, late.popleft()))
        return (*steps, *(Action(Kind.WEIGHT_GRAD, 0, m) for m in late))

    queued = tuple(min(rank + 1, num_micro_batches) for rank in range(num_ranks))
    return _schedule("zb1p", num_ranks, num_micro_batches, steps, plain.max_activations, queued)


def _schedule(
    kind: str,
    num_ranks: int,
    num_micro_batches: int,
    steps: Callable[[int], tuple[Step, ...]],
    max_activations: tuple[int, ...],
    max_deferred: tuple[int, ...],
) -> Schedule:
    assert min(num_ranks, num_micro_batches) >= 1, (num_ranks, num_micro_batches)
    ranks = range(num_ranks)
    return Schedule(
        kind=kind,
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        steps=tuple(steps(rank) for rank in ranks),
        stage_of=tuple((rank,) for rank in ranks),
        max_activations=max_activations,
        max_deferred=max_deferred,
    )
