"""DualPipe's generator against the published counts and bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Action, Kind, Overlap, flatten
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.eight_phases import phase_lengths
from dualray.schedule.verify import verify

EVEN_RANKS = st.integers(1, 8).map(lambda half: 2 * half)


@st.composite
def dualpipe_sizes(draw):
    ranks = draw(EVEN_RANKS)
    return ranks, 2 * ranks + 2 * draw(st.integers(0, 20))


def test_phase_lengths_at_8_ranks_and_20_micro_batches():
    expected = [
        (6, 1, 3, 3, 3, 1, 3, 1),
        (4, 2, 2, 4, 2, 2, 2, 2),
        (2, 3, 1, 5, 1, 3, 1, 3),
        (0, 4, 0, 6, 0, 4, 0, 4),
    ]
    assert [phase_lengths(distance, depth=4, num_micro_batches=10) for distance in range(4)] == (
        expected
    )
    # Two steps in phases 2, 4, 5, 6 and 7, three in phase 3; the middle ranks' first pair is two.
    sizes = (1, 2, 3, 2, 2, 2, 2, 1)
    steps = [sum(n * size for n, size in zip(lengths, sizes)) for lengths in expected]
    steps[3] += 1
    assert [len(rank) for rank in dualpipe(8, 20).steps] == steps + steps[::-1]


def test_smallest_schedule_in_full():
    text = [" ".join(map(str, steps)) for steps in dualpipe(2, 4).steps]
    assert text == [
        "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 I0.1 W",
        "F1.0 F0.0 F1.1 B0.0 F0.1&B1.0 B0.1 I1.1 W",
    ]


def test_input_gradients_start_after_b_for_even_and_before_b_for_odd_distance():
    # r=2 turns after the second far backward (B then I), r=1 before it.
    tails = [[str(step) for step in dualpipe(8, 20).steps[rank]] for rank in (1, 2)]
    assert tails[0][-10:] == ["B1.8", "B0.6", "I1.9", "I0.7", "W", "I0.8", "W", "I0.9", "W", "W"]
    assert tails[1][-11:] == [
        *("B1.7", "B0.6", "B1.8", "I0.7", "I1.9", "I0.8"),
        *("W", "I0.9", "W", "W", "W"),
    ]


@settings(deadline=None, max_examples=60)
@given(dualpipe_sizes())
def test_counts_memory_and_symmetry(sizes):
    ranks, chunks = sizes
    schedule = dualpipe(ranks, chunks)
    peaks = verify(schedule)
    assert peaks.activations == (ranks + 1,) * ranks
    for rank, steps in enumerate(schedule.steps):
        r = min(rank, ranks - 1 - rank)
        actions = list(flatten(steps))
        for direction in (0, 1):
            forwards = [a for a in actions if (a.kind, a.direction) == (Kind.FORWARD, direction)]
            backwards = [
                a
                for a in actions
                if a.kind in (Kind.BACKWARD, Kind.INPUT_GRAD) and a.direction == direction
            ]
            assert len(forwards) == len(backwards) == chunks // 2
        assert sum(a.kind is Kind.WEIGHT_GRAD for a in actions) == ranks - r - 1
        assert peaks.deferred[rank] <= r + 1
        mirror = tuple(_mirrored(step) for step in schedule.steps[ranks - 1 - rank])
        assert steps == mirror


def _mirrored(step):
    if isinstance(step, Overlap):
        return Overlap(_mirrored(step.forward), _mirrored(step.backward))
    return Action(step.kind, 1 - step.direction, step.micro_batch)


def test_directions_are_absolute():
    schedule = dualpipe(6, 12)
    assert schedule.stage_of == ((0, 5), (1, 4), (2, 3), (3, 2), (4, 1), (5, 0))
    assert schedule.upstream(0, 0) is None
    assert schedule.downstream(0, 0) == (1, 0)
    assert schedule.upstream(5, 1) is None
    assert schedule.downstream(5, 1) == (4, 1)
    assert schedule.downstream(0, 1) is None
    assert [str(steps[0]) for steps in schedule.steps] == ["F0.0"] * 3 + ["F1.0"] * 3


@pytest.mark.parametrize(("ranks", "chunks"), [(3, 12), (4, 9), (4, 6), (0, 4)])
def test_impossible_sizes_are_our_own_bug(ranks, chunks):
    with pytest.raises(AssertionError):
        dualpipe(ranks, chunks)
