"""DualPipe: micro-batches enter at both ends of the pipeline (arXiv 2412.19437, 3.2.1).

Rank p holds stage p for direction 0 and stage P-1-p for direction 1. Seen from its own end
every rank does the same: `near` is the direction that enters at the closer end, `far` the
other, and r the distance to that end. The eight phases below are the ones of the paper's
Figure 5, with h = P/2 and M micro-batches in each direction. Mirrored ranks run the same
phases with the directions exchanged.
"""

from __future__ import annotations

from collections import deque

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The DualPipe schedule; P even, micro-batches even and at least 2P (asserted).

    Every rank holds at most P+1 live micro-batches and r+1 queued weight gradients.
    """
    assert num_ranks >= 2, num_ranks
    assert num_micro_batches >= 2 * num_ranks, num_micro_batches
    assert num_ranks % 2 == num_micro_batches % 2 == 0, (num_ranks, num_micro_batches)
    ranks = range(num_ranks)
    return Schedule(
        kind="dualpipe",
        num_ranks=num_ranks,
        num_stages=num_ranks,
        num_micro_batches=num_micro_batches,
        steps=tuple(_rank_steps(rank, num_ranks, num_micro_batches) for rank in ranks),
        stage_of=tuple((rank, num_ranks - 1 - rank) for rank in ranks),
        max_activations=tuple(num_ranks + 1 for _ in ranks),
        max_deferred=tuple(min(rank, num_ranks - 1 - rank) + 1 for rank in ranks),
    )


def phase_lengths(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[int, ...]:
    """How often each of the eight phases repeats on `rank`."""
    r = min(rank, num_ranks - 1 - rank)
    inner = num_ranks // 2 - r - 1
    main = num_micro_batches // 2 - num_ranks + r + 1
    return (2 * inner, r + 1, inner, main, inner, r + 1, inner, r + 1)


class _Builder:
    """Numbers the micro-batches of one rank and remembers its queued weight gradients."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._forwards = [0, 0]
        self._backwards = [0, 0]
        self._queued: deque[Action] = deque()

    def forward(self, direction: int) -> Action:
        micro_batch = self._forwards[direction]
        self._forwards[direction] += 1
        return Action(Kind.FORWARD, direction, micro_batch)

    def backward(self, direction: int, *, split: bool = False) -> Action:
        micro_batch = self._backwards[direction]
        self._backwards[direction] += 1
        action = Action(Kind.INPUT_GRAD if split else Kind.BACKWARD, direction, micro_batch)
        if split:
            self._queued.append(action)
        return action

    def weight_grad(self) -> Action:
        oldest = self._queued.popleft()
        return Action(Kind.WEIGHT_GRAD, oldest.direction, oldest.micro_batch)


def _rank_steps(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Step, ...]:
    half = num_ranks // 2
    r = min(rank, num_ranks - 1 - rank)
    near, far = (0, 1) if rank < half else (1, 0)
    middle = r == half - 1
    lengths = phase_lengths(rank, num_ranks, num_micro_batches)
    build = _Builder()
    add = build.steps.append

    for _ in range(lengths[0]):
        add(build.forward(near))
    for _ in range(lengths[1]):
        add(build.forward(near))
        add(build.forward(far))
    for _ in range(lengths[2]):
        add(build.backward(far, split=True))
        add(build.weight_grad())
        add(build.forward(far))
    for i in range(lengths[3]):
        forward, backward = build.forward(near), build.backward(far)
        if i == 0 and middle:
            # The neighbour waits for this forward: apart, it leaves earlier than in a pair.
            add(forward)
            add(backward)
        else:
            add(Overlap(forward, backward))
        add(Overlap(build.forward(far), build.backward(near)))
    for _ in range(lengths[4]):
        add(build.backward(far))
        add(Overlap(build.forward(far), build.backward(near)))
    # In the cool-down input gradients go first, since the next rank waits for them; weight
    # gradients fill the gaps of the phases that follow.
    turn = (r + 1) // 2
    for i in range(lengths[5]):
        add(build.backward(far, split=i > turn or (i == turn and r % 2 == 1)))
        add(build.backward(near, split=i >= turn))
    for _ in range(lengths[6]):
        add(build.weight_grad())
        add(build.backward(near, split=True))
    for _ in range(lengths[7]):
        add(build.weight_grad())
    return tuple(build.steps)
