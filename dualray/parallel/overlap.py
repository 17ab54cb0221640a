"""Two strands of work in one worker: what one does while the other's message travels.

A micro-batch's forward and another's backward have no data in common, and each stops four
times a layer pair for an exchange between experts: dispatch and combine, and the gradients
of both. `Strands` runs them as two threads of which only one is ever awake. Whoever has started
an exchange lets the other go on and waits for its message until the turn comes back; by then the
other strand has computed for a while, and started an exchange of its own (arXiv 2412.19437,
figure 4).

A message that says when it is here (`Future`) lets turns follow messages: a strand whose message
is here already goes on, one whose message is not lets the other have the turn whenever that can
use it, and where both wait there is time for what has been put off. Without, as on a GPU, where
the host only queues work, turns change at every exchange. Either way each strand does the same
things in the same order and adds to sums of its own, so not a bit depends on turns. The two use
different process groups, so the order of collectives within a group does not depend on them either.

Threads, and not a second model cut into phases: autograd's own graph stays whole, and every
layer that communicates is interleaved, those of multi-token prediction included. Changing turns
takes 20 us (Zen 4 core).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

Arrival = Future[Any]
"""Done when a message is here."""


class _Abandoned(BaseException):
    """Unwinds a strand whose partner has failed. The partner's error is the one to report."""


class _Pair:
    """Whose turn it is. Strand 0 begins."""

    def __init__(self) -> None:
        self._gates = (threading.Semaphore(0), threading.Semaphore(0))
        self._alive = [True, True]
        self._turn = 0
        self._broken = False
        self._awaits: list[Arrival | None] = [None, None]

    def other_awaits(self) -> Arrival | None:
        """The message that the other strand waits for, if it does; it can go on otherwise."""
        return self._awaits[1 - self._turn]

    @property
    def has_other(self) -> bool:
        """Whether the other strand has not ended."""
        return self._alive[1 - self._turn]

    def hand_over(self, arrival: Arrival | None = None) -> None:
        """Let the other strand run until it hands over or ends; meanwhile `arrival` is awaited."""
        self._awaits[self._turn] = arrival
        self._hand_over()
        self._awaits[self._turn] = None

    def _hand_over(self) -> None:
        mine, other = self._turn, 1 - self._turn
        if self._alive[other]:
            self._turn = other
            self._gates[other].release()
            self.wait(mine)

    def wait(self, strand: int) -> None:
        """Sleep until it is the turn of `strand`."""
        self._gates[strand].acquire()
        if self._broken:
            raise _Abandoned

    def run(self, strand: int, work: Callable[[], None]) -> None:
        """Run one strand to its end; in the thread that is to be that strand."""
        try:
            if strand == 1:
                self.wait(1)
            work()
        except BaseException:
            self._broken = True
            raise
        finally:
            self._alive[strand] = False
            self._turn = 1 - strand
            self._gates[1 - strand].release()


class Strands:
    """Runs pairs of functions in turns; alone, a function simply goes on.

    `prepare` is called once in the second thread, which has its own notion of the current device
    and of whether gradients are wanted.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._pair: _Pair | None = None
        # One thread for all pairs: a new one would also start a new pool of OpenMP threads.
        self._second = ThreadPoolExecutor(1, thread_name_prefix="strand", initializer=prepare)

    def hand_over(self) -> None:
        """Let the other strand go on, if there is one; returns when the turn comes back."""
        if self._pair is not None:
            self._pair.hand_over()

    def wait(
        self, arrival: Arrival, put_off: Callable[[], bool], idle: Callable[[float], None]
    ) -> None:
        """Returns when the message is here; until then the other strand goes on when it can.

        While it cannot, `put_off` does a piece of other work and says whether there was any. After
        a time in which there was nothing to do, `idle` is told since when (time.perf_counter).
        """
        while not arrival.done():
            pair = self._pair
            awaited = None
            if pair is not None and pair.has_other:
                awaited = pair.other_awaits()
                if awaited is None or awaited.done():
                    pair.hand_over(arrival)
                    continue
            if not put_off():
                since = time.perf_counter()
                wait([arrival] if awaited is None else [arrival, awaited], None, FIRST_COMPLETED)
                idle(since)

    def run(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """Run both to their ends, `first` until its first hand-over before `second` begins.

        `second` runs in the calling thread. Raises the error of the strand that failed first,
        after the other one has been unwound.
        """
        pair = self._pair = _Pair()
        try:
            other = self._second.submit(pair.run, 0, first)
            own: BaseException | None = None
            try:
                pair.run(1, second)
            except BaseException as error:
                own = error
            failed = other.exception()
            for error in (failed, own):
                if error is not None and not isinstance(error, _Abandoned):
                    raise error
        finally:
            self._pair = None

    def close(self) -> None:
        """End the second thread."""
        self._second.shutdown()
