"""What a step costs besides computing, and how long workers idle in it, from noted times.

All times are of one machine's monotonic clock. Medians over steps, in milliseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from dualray.platform.bench.serve_gang import EngineStep, WorkerStep

_NS_PER_MS = 1e6


def step_overhead(
    engine: Sequence[EngineStep], workers: Sequence[Sequence[WorkerStep]]
) -> dict[str, Any]:
    """Where the time of steps goes that is not spent in workers.

    `beyond_slowest_ms`: of the engine's wall time what exceeds the slowest worker's time in its
    walk. `until_last_began_ms` and `after_last_end_ms` count more: a worker that began early
    waits in its walk for those that begin late. `between_ms`: the engine's own work from the
    answers of a step to the next plan, while there is something to run.
    """
    by_step = [{step.step: step for step in each} for each in workers]
    rows = []
    for step in engine:
        walks = [each[step.step] for each in by_step]
        rows.append(
            {
                "step_ms": step.ended_ns - step.began_ns,
                "beyond_slowest_ms": step.ended_ns
                - step.began_ns
                - max(walk.ended_ns - walk.began_ns for walk in walks),
                "until_last_began_ms": max(walk.began_ns for walk in walks) - step.began_ns,
                "after_last_end_ms": step.ended_ns - max(walk.ended_ns for walk in walks),
            }
        )
    between = [later.began_ns - one.ended_ns for one, later in pairwise(engine)]
    names = rows[0] if rows else {}
    return {
        "steps": len(rows),
        **{name: _median_ms(row[name] for row in rows) for name in names},
        "between_ms": _median_ms(between),
    }


def busy_shares(
    engine: Sequence[EngineStep], workers: Sequence[Sequence[WorkerStep]], *, cores: int
) -> dict[str, Any]:
    """How busy workers were while the engine awaited steps, by processor time of their walks.

    `cores_busy` is their part of the machine's cores, of which there may be fewer than workers.
    `idle_with_own_cores`: were each worker alone on a core and every step as long as its busiest
    worker computes, the share of time that workers would idle: what uneven work costs, and
    nothing that a pipeline's order does.
    """
    wall_ns = sum(step.ended_ns - step.began_ns for step in engine)
    by_step = [{step.step: step.cpu_ns for step in each} for each in workers]
    cpu = [[each[step.step] for each in by_step] for step in engine]
    total_ns = sum(map(sum, cpu))
    longest_ns = sum(map(max, cpu))
    return {
        "cores_busy": total_ns / (wall_ns * cores),
        "idle_with_own_cores": 1 - total_ns / (longest_ns * len(workers)),
    }


def _median_ms(values_ns: Iterable[float]) -> float | None:
    found = list(values_ns)
    return statistics.median(found) / _NS_PER_MS if found else None
