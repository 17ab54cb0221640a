"""Adjacent pairs roll: a backward begins while the forward of the pair before waits."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from dualray.parallel.executor import _Pairs
from dualray.parallel.overlap import Strands
from dualray.parallel.spans import Spans
from dualray.schedule.actions import Action, Kind, Overlap


def pair(number: int) -> Overlap:
    """F0 and B1 in turn with F1 and B0, as in a schedule."""
    direction = number % 2
    forward = Action(Kind.FORWARD, direction, 10 + number)
    return Overlap(forward, Action(Kind.BACKWARD, 1 - direction, number))


class FakeWalk:
    """Three pairs and a W. The forward of a pair waits for what the next pair's backward does."""

    def __init__(self, *, ready: bool = True, live: bool = True, waits: bool = True) -> None:
        self.steps = (pair(0), pair(1), pair(2), Action(Kind.WEIGHT_GRAD, 0, 0))
        self.live = {(1 - n % 2, n): None for n in range(3)} if live else {}
        self.inbox = SimpleNamespace(is_ready=lambda number: ready)
        self.sums = SimpleNamespace(spans=Spans())
        self.strands = Strands(lambda: None)
        self.events: list[str] = []
        self.begun = [Future() for _ in range(4)]
        self.waits = waits

    def _now(self) -> float:
        return time.perf_counter()

    def _receive(self, number: int) -> None:
        self.events.append(f"receive {number}")

    def _do(self, action: Action) -> None:
        self.events.append(str(action))
        number = action.micro_batch % 10
        if action.kind is Kind.BACKWARD:
            self.begun[number].set_result(None)
            # Hands over once within, as an exchange does.
            self.strands.hand_over()
        elif self.waits and number < 2:
            self.strands.wait(self.begun[number + 1], self._nothing, self._idle)
        self.events.append(f"{action} ends")

    def _nothing(self) -> bool:
        raise AssertionError("nobody does what the forward waits for")

    def _idle(self, since: float) -> None:
        raise AssertionError("both wait")

    def run(self) -> int:
        pairs = _Pairs(self, 0)
        self.strands.run(pairs.backwards, pairs.forwards)
        return pairs.end()


def test_a_backward_begins_while_the_forward_before_it_waits() -> None:
    walk = FakeWalk()
    assert walk.run() == 3
    at = walk.events.index
    for number in (1, 2):
        before, now = pair(number - 1), pair(number)
        assert at(f"receive {number}") < at(str(now.backward))
        assert at(str(now.backward)) < at(f"{before.forward} ends")
        # One live micro-batch more would be too many.
        assert at(f"{before.backward} ends") < at(str(now.forward))
    assert [name for name, *_ in walk.sums.spans.taken] == [str(pair(n)) for n in range(3)]
    ends = [end for *_, end in walk.sums.spans.taken]
    assert [start for *_, start, _ in walk.sums.spans.taken][1:] == ends[:-1]


@pytest.mark.parametrize("hindrance", [{"ready": False}, {"live": False}])
def test_it_does_not_begin_without_its_input_or_its_forward(hindrance) -> None:
    walk = FakeWalk(waits=False, **hindrance)
    assert walk.run() == 1
    assert not [event for event in walk.events if event.startswith("receive")]
    assert [name for name, *_ in walk.sums.spans.taken] == [str(pair(0))]
