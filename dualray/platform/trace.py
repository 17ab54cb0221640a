"""`trace.json`: what every worker did when, as a Chrome trace that opens in Perfetto.

One process per worker (`pid` is its rank), with a thread per category; below them one process per
pipeline rank of the simulated schedule, whose pids begin at `SIMULATED_PID`. Perfetto draws the
spans of a thread only if they nest, so those that cross each other, as journeys of two
micro-batches do, get a second thread of their category.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dualray.errors import RunError
from dualray.parallel import spans as noted

SIMULATED_PID = 1_000_000
"""More than any world has ranks."""


class Category(StrEnum):
    """What spans are of; in the order in which a worker's threads are shown."""

    COMPUTE = noted.COMPUTE
    WAITING = noted.WAITING
    COMMUNICATION = noted.COMMUNICATION
    OPTIMIZER = noted.OPTIMIZER
    CHECKPOINT = noted.CHECKPOINT


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that one worker did."""

    rank: int
    """World rank of the worker; of a simulated span the pipeline rank."""
    name: str
    """The action's text (`F0.3`, `B1.2`, `W`, `F0.3&B1.2`), or what was sent or stepped."""
    category: Category | str
    """One of `Category`'s words."""
    start_s: float
    """Seconds on a clock that all workers share."""
    end_s: float
    """Seconds on the same clock."""


@dataclass(frozen=True)
class Trace:
    """The spans of one trace file, by start time, and the optimizer step they belong to."""

    spans: tuple[Span, ...]
    """What was measured."""
    step: int | None = None
    simulated: tuple[Span, ...] = ()
    """What the same schedule would look like without waiting for anything but its inputs."""

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}))

    def bubble(self) -> float | None:
        """Mean idle fraction of the workers between the first and last compute span of all.

        None if nothing was computed. Nested or overlapping spans count once.
        """
        return _idle_share(self.spans)

    def bubble_simulated(self) -> float | None:
        """The same of the simulated schedule; None if there is none."""
        return _idle_share(self.simulated)


def write_trace(path: Path, trace: Trace, *, worker_names: Mapping[int, str] | None = None) -> None:
    """Write a Chrome trace; times become microseconds since the earliest start.

    `worker_names` titles the processes in Perfetto (default `worker RANK`). The file is
    replaced as a whole or not at all.
    """
    origin_s = min((span.start_s for span in (*trace.spans, *trace.simulated)), default=0.0)
    names = worker_names or {}
    events: list[dict[str, Any]] = []
    for rank, own in _by_rank(trace.spans):
        events.extend(_process(rank, names.get(rank, f"worker {rank}"), own, origin_s))
    for rank, own in _by_rank(trace.simulated):
        title = f"simulated: pipeline rank {rank}"
        events.extend(_process(SIMULATED_PID + rank, title, own, origin_s))
    document: dict[str, Any] = {"traceEvents": events, "displayTimeUnit": "ms"}
    if trace.step is not None:
        document["otherData"] = {"step": trace.step}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    os.replace(partial, path)


def read_trace(path: Path) -> Trace:
    """Read a trace that `write_trace` wrote; raises RunError if it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        events = [event for event in document["traceEvents"] if event.get("ph") == "X"]
        measured = [_span(event, 0) for event in events if int(event["pid"]) < SIMULATED_PID]
        simulated = [
            _span(event, SIMULATED_PID) for event in events if int(event["pid"]) >= SIMULATED_PID
        ]
        step = document.get("otherData", {}).get("step")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{path} is not a trace that dualray wrote",
            hint="delete it to do without the pipeline timeline, or run the training again",
        ) from None
    return Trace(spans=_ordered(measured), step=step, simulated=_ordered(simulated))


def _process(pid: int, title: str, spans: list[Span], origin_s: float) -> Iterator[dict[str, Any]]:
    """The events of one process: its name and threads, then its spans."""
    yield _metadata("process_name", pid, 0, name=title)
    yield _metadata("process_sort_index", pid, 0, sort_index=pid)
    by_category: dict[str, list[Span]] = {category: [] for category in Category}
    for span in spans:
        by_category[span.category].append(span)
    for place, (category, own) in enumerate(by_category.items()):
        # Whole nanoseconds, so that rounding lets no span reach into the one behind it.
        times = [
            (round((span.start_s - origin_s) * 1e9), round((span.end_s - origin_s) * 1e9))
            for span in own
        ]
        lanes = _lanes(times)
        for lane in range(max(lanes, default=-1) + 1):
            tid = place + lane * len(Category)
            name = category if lane == 0 else f"{category} {lane + 1}"
            yield _metadata("thread_name", pid, tid, name=name)
            yield _metadata("thread_sort_index", pid, tid, sort_index=100 * place + lane)
        for span, (start, end), lane in zip(own, times, lanes):
            yield {
                "ph": "X",
                "name": span.name,
                "cat": category,
                "pid": pid,
                "tid": place + lane * len(Category),
                "ts": start / 1e3,
                "dur": (end - start) / 1e3,
            }


def _metadata(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _lanes(times: Sequence[tuple[int, int]]) -> list[int]:
    """For each (start, end) a lane, the first in which spans still nest."""
    lanes = [0] * len(times)
    ends: list[list[int]] = []
    for index in sorted(range(len(times)), key=lambda index: (times[index][0], -times[index][1])):
        start, end = times[index]
        for around in ends:
            while around and around[-1] <= start:
                around.pop()
        fitting = (i for i, around in enumerate(ends) if not around or end <= around[-1])
        lane = next(fitting, len(ends))
        if lane == len(ends):
            ends.append([])
        ends[lane].append(end)
        lanes[index] = lane
    return lanes


def _by_rank(spans: Iterable[Span]) -> Iterator[tuple[int, list[Span]]]:
    of: dict[int, list[Span]] = {}
    for span in _ordered(spans):
        of.setdefault(span.rank, []).append(span)
    yield from sorted(of.items())


def _ordered(spans: Iterable[Span]) -> tuple[Span, ...]:
    return tuple(sorted(spans, key=lambda span: (span.start_s, span.rank)))


def _span(event: dict[str, Any], first_pid: int) -> Span:
    return Span(
        rank=int(event["pid"]) - first_pid,
        name=str(event["name"]),
        category=str(event["cat"]),
        start_s=float(event["ts"]) * 1e-6,
        end_s=(float(event["ts"]) + float(event["dur"])) * 1e-6,
    )


def _idle_share(spans: Iterable[Span]) -> float | None:
    compute = [span for span in spans if span.category == Category.COMPUTE]
    if not compute:
        return None
    start = min(span.start_s for span in compute)
    end = max(span.end_s for span in compute)
    if end <= start:
        return None
    ranks = {span.rank for span in compute}
    busy = sum(_covered([s for s in compute if s.rank == rank]) for rank in ranks)
    return 1.0 - busy / (len(ranks) * (end - start))


def _covered(spans: list[Span]) -> float:
    """Seconds covered by the union of spans."""
    total = 0.0
    reached = float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.end_s - max(span.start_s, reached))
        reached = max(reached, span.end_s)
    return total
