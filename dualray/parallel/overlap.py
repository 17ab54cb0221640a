"""Two strands of work in one worker: what one does while the other's message travels.

A micro-batch's forward and another's backward have no data in common, and each stops four
times a layer pair for an exchange between experts: dispatch and combine, and the gradients
of both. `Strands` runs them as two threads of which only one is ever awake. Whoever has started
an exchange hands the turn over and waits for its message when the turn comes back; by then the
other strand has computed for a while, and started an exchange of its own (arXiv 2412.19437,
figure 4). Places of handing over are places in the program and never depend on time, so all
workers of an exchange start their collectives in the same order, and sums are added in the order
of a sequential walk: not a bit differs.

Threads, and not a second model cut into phases: autograd's own graph stays whole, and every
layer that communicates is interleaved, those of multi-token prediction included. Changing turns
takes 20 us (Zen 4 core).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class _Abandoned(BaseException):
    """Unwinds a strand whose partner has failed. The partner's error is the one to report."""


class _Pair:
    """Whose turn it is. Strand 0 begins."""

    def __init__(self) -> None:
        self._gates = (threading.Semaphore(0), threading.Semaphore(0))
        self._alive = [True, True]
        self._turn = 0
        self._broken = False

    def hand_over(self) -> None:
        """Let the other strand run until it hands over or ends."""
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
