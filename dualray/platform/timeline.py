"""The timeline of one step: what its workers did, and the same schedule simulated beside it.

The simulation is given what the step's own actions cost, so the two pictures differ only in what
a schedule cannot know: workers that wait for each other in other ways, and times that vary.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualray.parallel.layout import Layout
from dualray.parallel.spans import COMPUTE, SpanTuple
from dualray.platform.costs import StepSpan, measured_costs, measured_exchange
from dualray.platform.trace import Category, Span, Trace
from dualray.schedule.actions import Schedule
from dualray.schedule.simulate import Costs, simulate


def step_trace(
    spans: Sequence[Sequence[SpanTuple]], *, step: int, layout: Layout, schedule: Schedule
) -> Trace:
    """The trace of optimizer step `step`; `spans` are every worker's, by world rank.

    The simulated track begins when the first worker computes. There is none if workers noted no
    computation.
    """
    measured = tuple(Span(rank, *span) for rank, own in enumerate(spans) for span in own)
    walks = walks_of(spans, layout)
    if not all(walk for workers in walks for walk in workers):
        return Trace(measured, step)
    costs, exchange_s = step_costs(walks, schedule)
    timeline = simulate(schedule, costs, exchange=exchange_s)
    begin_s = min(start for workers in walks for walk in workers for _, start, _ in walk)
    simulated = tuple(
        Span(rank, str(what), Category.COMPUTE, begin_s + start, begin_s + end)
        for rank, row in enumerate(timeline.rows)
        for what, start, end in row
    )
    return Trace(measured, step, simulated)


def step_costs(
    walks: Sequence[Sequence[Sequence[StepSpan]]], schedule: Schedule
) -> tuple[tuple[Costs, ...], float]:
    """What one step's walks cost each stage, and what a message between pipeline ranks took."""
    times = [
        [[(text, end - start) for text, start, end in walk] for walk in workers]
        for workers in walks
    ]
    return measured_costs(times, schedule), measured_exchange(walks, schedule)


def walks_of(spans: Sequence[Sequence[SpanTuple]], layout: Layout) -> list[list[list[StepSpan]]]:
    """The computations of every worker, by pipeline rank, as `costs` takes them."""
    walks: list[list[list[StepSpan]]] = [[] for _ in range(layout.pipeline)]
    for rank, own in enumerate(spans):
        walk = [(name, start, end) for name, category, start, end in own if category == COMPUTE]
        walks[layout.coordinate(rank).pipeline].append(walk)
    return walks


def worker_title(rank: int, layout: Layout | None) -> str:
    """`worker 3 (pipeline 1, expert 1)`: the axes along which the layout has several."""
    if layout is None or rank >= layout.world_size:
        return f"worker {rank}"
    at = layout.coordinate(rank)
    parts = [f"pipeline {at.pipeline}"] if layout.pipeline > 1 else []
    parts += [f"expert {at.expert}"] if layout.experts > 1 else []
    parts += [f"replica {at.replica}"] if layout.replicas > 1 else []
    return f"worker {rank}" + (f" ({', '.join(parts)})" if parts else "")
