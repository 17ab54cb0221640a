"""DualPipeV against DualPipe and the published bounds; torch's order is in its own test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Kind, flatten
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev
from dualray.schedule.verify import verify


@st.composite
def sizes(draw):
    ranks = draw(st.integers(1, 16))
    return ranks, 2 * ranks + draw(st.integers(0, 20))


def test_smallest_schedule_in_full():
    assert [" ".join(map(str, steps)) for steps in dualpipev(2, 4).steps] == [
        "F0.0 F0.1 F0.2 F1.0 I1.0 W F1.1 F0.3&B1.1 F1.2&B0.0 B1.2 F1.3&B0.1 B1.3 I0.2 W I0.3 W",
        "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2&B0.0 F0.3&B1.1 F1.3&B0.1 B1.2 B0.2 I1.3 I0.3 W W",
    ]


def test_one_rank_pairs_both_legs_of_different_micro_batches():
    assert [" ".join(map(str, steps)) for steps in dualpipev(1, 3).steps] == [
        "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 F0.2&B1.1 F1.2&B0.1 B1.2 I0.2 W"
    ]


@settings(deadline=None, max_examples=40)
@given(sizes())
def test_it_is_the_first_half_of_dualpipe(size):
    """Each leg carries every micro-batch, a direction of DualPipe half of them."""
    ranks, chunks = size
    assert dualpipev(ranks, chunks).steps == dualpipe(2 * ranks, 2 * chunks).steps[:ranks]


@settings(deadline=None, max_examples=40)
@given(sizes())
def test_counts_and_memory(size):
    ranks, chunks = size
    schedule = dualpipev(ranks, chunks)
    peaks = verify(schedule)
    assert peaks.activations == (2 * ranks + 1,) * ranks
    assert peaks.deferred == tuple(rank + 1 for rank in range(ranks))
    for rank, steps in enumerate(schedule.steps):
        weight_grads = sum(action.kind is Kind.WEIGHT_GRAD for action in flatten(steps))
        assert weight_grads == 2 * ranks - rank - 1


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 1), (3, 5), (0, 4)])
def test_impossible_sizes_are_our_own_bug(ranks, chunks):
    with pytest.raises(AssertionError):
        dualpipev(ranks, chunks)
