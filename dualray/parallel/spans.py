"""What a worker did when, for timelines and for the costs that schedules are chosen by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

COMPUTE, WAITING, COMMUNICATION = "compute", "waiting", "communication"
OPTIMIZER, CHECKPOINT = "optimizer", "checkpoint"

SpanTuple = tuple[str, str, float, float]
"""(name, category, start, end), seconds of the epoch. Plain, since it travels between processes."""


class Spans:
    """Notes spans of `time.perf_counter`, and keeps them in seconds of the epoch."""

    def __init__(self) -> None:
        self.taken: list[SpanTuple] = []
        self._epoch = time.time() - time.perf_counter()

    def add(self, name: str, category: str, start: float, end: float) -> None:
        """`start` and `end` are readings of `time.perf_counter`."""
        self.taken.append((name, category, self._epoch + start, self._epoch + end))

    @contextmanager
    def noted(self, name: str, category: str) -> Iterator[None]:
        """A span from here to the end of the `with` block."""
        start = time.perf_counter()
        yield
        self.add(name, category, start, time.perf_counter())
