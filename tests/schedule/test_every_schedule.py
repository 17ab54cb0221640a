"""What holds for all five schedules at every size."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Kind, flatten
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs, simulate
from dualray.schedule.verify import verify


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(list(KINDS)))
    ranks, extra = draw(st.integers(1, 16)), draw(st.integers(0, 24))
    if kind == "dualpipe":
        ranks, extra = ranks + ranks % 2, 2 * extra
    least = 2 * ranks if kind.startswith("dualpipe") else 1
    return make_schedule(kind, ranks, least + extra)


@st.composite
def costs(draw):
    """Whole numbers, so that sums are exact; a pair hides at most its shorter half."""
    forward, input_grad = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    weight = draw(st.integers(0, 6))
    hidden = draw(st.integers(0, min(forward, input_grad + weight)))
    return Costs(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight,
        overlapped=forward + input_grad + weight - hidden,
    )


@settings(deadline=None, max_examples=150)
@given(schedules())
def test_sound_and_within_its_promises(schedule):
    peaks = verify(schedule)
    # The promises are kept, and none is larger than it need be.
    assert peaks.activations == schedule.max_activations
    assert peaks.deferred == schedule.max_deferred


@settings(deadline=None, max_examples=60)
@given(schedules())
def test_every_stage_runs_every_micro_batch_once(schedule):
    runs = {kind: Counter() for kind in Kind}
    for stages, steps in zip(schedule.stage_of, schedule.steps):
        for action in flatten(steps):
            stream = schedule.entry_of(action.direction)
            runs[action.kind][stream, stages[action.direction], action.micro_batch] += 1
    every = Counter(
        (stream, stage, micro_batch)
        for stream in schedule.entries
        for stage in range(schedule.num_stages)
        for micro_batch in range(schedule.micro_batches_of(stream))
    )
    assert every.total() == schedule.num_stages * schedule.num_micro_batches
    assert runs[Kind.FORWARD] == every
    assert runs[Kind.BACKWARD] + runs[Kind.INPUT_GRAD] == every
    assert runs[Kind.WEIGHT_GRAD] == runs[Kind.INPUT_GRAD]


@settings(deadline=None, max_examples=60)
@given(half=st.integers(1, 8), extra=st.integers(0, 12), table=costs())
def test_each_published_schedule_idles_no_more_than_the_one_before(half, extra, table):
    ranks, chunks = 2 * half, 4 * half + 2 * extra
    spans = [
        simulate(make_schedule(kind, ranks, chunks), table).makespan
        for kind in ("gpipe", "1f1b", "zb1p", "dualpipe")
    ]
    assert all(later <= earlier for earlier, later in pairwise(spans))


@settings(deadline=None, max_examples=60)
@given(schedules(), costs(), st.integers(0, 3))
def test_a_timeline_keeps_every_order(schedule, table, exchange):
    timeline = simulate(schedule, table, exchange=exchange)
    starts, ends = {}, {}
    for rank, row in enumerate(timeline.rows):
        assert tuple(step for step, _, _ in row) == schedule.steps[rank]
        assert all(end <= start for (_, _, end), (_, start, _) in pairwise(row))
        for step, start, end in row:
            for action in flatten((step,)):
                if action.kind is not Kind.WEIGHT_GRAD:
                    key = (action.kind is Kind.FORWARD, rank, action.direction, action.micro_batch)
                    starts[key], ends[key] = start, end
    for (forward, rank, direction, micro_batch), start in starts.items():
        neighbour = schedule.upstream if forward else schedule.downstream
        source = neighbour(rank, direction)
        if source is not None:
            delay = exchange if source[0] != rank else 0
            assert start >= ends[forward, *source, micro_batch] + delay
