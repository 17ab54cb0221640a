"""The eight phases that DualPipe and DualPipeV share (arXiv 2412.19437, 3.2.1, Figure 5).

Every rank sits between an outer end, where it takes micro-batches in `near` and gives those
of `far` away, and a turning point: the middle of the pipeline under DualPipe, the bottom of
the V under DualPipeV. `distance` counts the ranks on its outer side, `depth` those of one
side altogether. Both schedules do the same with these numbers and differ in who sits where.
"""

from __future__ import annotations

from collections import deque

from dualray.schedule.actions import Action, Kind, Overlap, Step


def phase_lengths(distance: int, depth: int, num_micro_batches: int) -> tuple[int, ...]:
    """How often each of the eight phases repeats, with `num_micro_batches` in each direction."""
    inner = depth - distance - 1
    main = num_micro_batches - 2 * depth + distance + 1
    return (2 * inner, distance + 1, inner, main, inner, distance + 1, inner, distance + 1)


def eight_phases(
    distance: int, depth: int, num_micro_batches: int, *, near: int, far: int
) -> tuple[Step, ...]:
    """The steps of one rank; queues at most `distance` + 1 weight gradients at a time."""
    lengths = phase_lengths(distance, depth, num_micro_batches)
    turns = distance == depth - 1
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
        if i == 0 and turns:
            # The next stage waits for this forward: apart, it leaves earlier than in a pair.
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
    half = (distance + 1) // 2
    for i in range(lengths[5]):
        add(build.backward(far, split=i > half or (i == half and distance % 2 == 1)))
        add(build.backward(near, split=i >= half))
    for _ in range(lengths[6]):
        add(build.weight_grad())
        add(build.backward(near, split=True))
    for _ in range(lengths[7]):
        add(build.weight_grad())
    return tuple(build.steps)


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
