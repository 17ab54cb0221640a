"""`trace.json`: what every worker did when, as a Chrome trace that opens in Perfetto.

One process per worker (`pid` is its rank) and one thread per category, because Perfetto
draws spans of one thread only if they nest, while communication runs beside computation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from dualray.errors import RunError


class Category(StrEnum):
    COMPUTE = "compute"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that one worker did."""

    rank: int
    """World rank of the worker."""
    name: str
    """The action's text (`F0.3`, `B1.2`, `W`, `F0.3&B1.2`), or what was sent or stepped."""
    category: Category | str
    """`compute`, `communication` or `optimizer`."""
    start_s: float
    """Seconds on a clock that all workers share."""
    end_s: float
    """Seconds on the same clock."""


@dataclass(frozen=True)
class Trace:
    """The spans of one trace file, by start time, and the optimizer step they belong to."""

    spans: tuple[Span, ...]
    step: int | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({span.rank for span in self.spans}))

    def bubble(self) -> float | None:
        """Mean idle fraction of the workers between the first and last compute span of all.

        None if nothing was computed. Nested or overlapping spans count once.
        """
        compute = [span for span in self.spans if span.category == Category.COMPUTE]
        if not compute:
            return None
        start = min(span.start_s for span in compute)
        end = max(span.end_s for span in compute)
        if end <= start:
            return None
        ranks = {span.rank for span in compute}
        busy = sum(_covered([s for s in compute if s.rank == rank]) for rank in ranks)
        return 1.0 - busy / (len(ranks) * (end - start))


def write_trace(
    path: Path,
    spans: Iterable[Span],
    *,
    step: int | None = None,
    worker_names: Mapping[int, str] | None = None,
) -> None:
    """Write spans as a Chrome trace; times become microseconds since the earliest start.

    `worker_names` titles the processes in Perfetto (default `worker RANK`). The file is
    replaced as a whole or not at all.
    """
    ordered = sorted(spans, key=lambda span: (span.start_s, span.rank))
    origin = ordered[0].start_s if ordered else 0.0
    names = worker_names or {}
    threads = {category.value: index for index, category in enumerate(Category)}
    events: list[dict[str, Any]] = []
    for rank in sorted({span.rank for span in ordered}):
        title = names.get(rank, f"worker {rank}")
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": title}})
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        )
        events.extend(
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": category}}
            for category, tid in threads.items()
        )
    events.extend(
        {
            "ph": "X",
            "name": span.name,
            "cat": str(span.category),
            "pid": span.rank,
            "tid": threads.get(str(span.category), len(threads)),
            "ts": round((span.start_s - origin) * 1e6, 3),
            "dur": round((span.end_s - span.start_s) * 1e6, 3),
        }
        for span in ordered
    )
    document: dict[str, Any] = {"traceEvents": events, "displayTimeUnit": "ms"}
    if step is not None:
        document["otherData"] = {"step": step}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    os.replace(partial, path)


def read_trace(path: Path) -> Trace:
    """Read a trace that `write_trace` wrote; raises RunError if it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        spans = [
            Span(
                rank=int(event["pid"]),
                name=str(event["name"]),
                category=str(event["cat"]),
                start_s=float(event["ts"]) * 1e-6,
                end_s=(float(event["ts"]) + float(event["dur"])) * 1e-6,
            )
            for event in document["traceEvents"]
            if event.get("ph") == "X"
        ]
        step = document.get("otherData", {}).get("step")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(
            f"{path} is not a trace that dualray wrote",
            hint="delete it to do without the pipeline timeline, or run the training again",
        ) from None
    spans.sort(key=lambda span: (span.start_s, span.rank))
    return Trace(spans=tuple(spans), step=step)


def _covered(spans: list[Span]) -> float:
    """Seconds covered by the union of spans."""
    total = 0.0
    reached = float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        total += max(0.0, span.end_s - max(span.start_s, reached))
        reached = max(reached, span.end_s)
    return total
