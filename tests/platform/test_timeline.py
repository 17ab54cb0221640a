"""The timeline of a step: the simulated schedule beside what workers noted."""

from __future__ import annotations

import pytest

from dualray.parallel.layout import Layout
from dualray.parallel.spans import COMMUNICATION, COMPUTE, SpanTuple
from dualray.platform.timeline import step_trace, worker_title
from dualray.platform.trace import Trace
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs, Timeline, simulate

LAYOUT = Layout(pipeline=4, experts=2, schedule="1f1b")
SCHEDULE = make_schedule("1f1b", 4, 8)
COSTS = Costs(forward=0.25, input_grad=0.25, weight_grad=0.25, overlapped=0.75)
BEGIN_S = 1e9
"""Spans are seconds of the epoch, of which doubles keep 1e-7."""


def ran(timeline: Timeline) -> list[list[SpanTuple]]:
    """What the workers of LAYOUT would note, exchanges with expert ranks included."""
    spans: list[list[SpanTuple]] = []
    for rank in range(LAYOUT.world_size):
        row = timeline.rows[LAYOUT.coordinate(rank).pipeline]
        spans.append([])
        for step, start, end in row:
            start, end = BEGIN_S + start, BEGIN_S + end
            spans[rank].append(("dispatch 1", COMMUNICATION, start - 0.5, end))
            spans[rank].append((str(step), COMPUTE, start, end))
    return spans


def test_the_simulation_of_a_simulation_is_itself() -> None:
    timeline = simulate(SCHEDULE, COSTS, exchange=0.125)
    trace = step_trace(ran(timeline), step=5, layout=LAYOUT, schedule=SCHEDULE)
    assert trace.step == 5
    assert len(trace.spans) == 2 * sum(len(row) for row in timeline.rows) * LAYOUT.experts
    found = {(span.rank, span.name): (span.start_s, span.end_s) for span in trace.simulated}
    for rank, row in enumerate(timeline.rows):
        for step, start, end in row:
            expected = (BEGIN_S + start, BEGIN_S + end)
            assert found[rank, str(step)] == pytest.approx(expected, abs=1e-5)
    assert trace.bubble() == pytest.approx(timeline.bubble, abs=1e-5)
    assert trace.bubble_simulated() == pytest.approx(timeline.bubble, abs=1e-5)


def test_workers_that_noted_nothing_are_not_simulated() -> None:
    spans: list[list[SpanTuple]] = [[] for _ in range(LAYOUT.world_size)]
    assert step_trace(spans, step=1, layout=LAYOUT, schedule=SCHEDULE) == Trace((), step=1)


def test_titles_name_the_axes_that_have_several_ranks() -> None:
    assert worker_title(3, LAYOUT) == "worker 3 (pipeline 1, expert 1)"
    assert worker_title(1, Layout(replicas=2)) == "worker 1 (replica 1)"
    assert worker_title(0, Layout()) == worker_title(0, None) == "worker 0"
