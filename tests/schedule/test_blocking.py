"""Blocking exchange is stricter than buffered sends, and is told apart from them."""

import pytest

from dualray.schedule.actions import Action, Kind, Schedule
from dualray.schedule.exchanges import Exchanges, ScheduleError, in_order
from dualray.schedule.verify import verify


def two_ranks(*texts, num_micro_batches):
    """A schedule of two ranks with a stream each way, from texts such as `F0.1`."""
    kinds = {kind.value: kind for kind in Kind}
    rows = [
        tuple(Action(kinds[word[0]], int(word[1]), int(word[3:])) for word in text.split())
        for text in texts
    ]
    return Schedule(
        kind="two",
        num_ranks=2,
        num_stages=2,
        num_micro_batches=num_micro_batches,
        steps=tuple(rows),
        stage_of=((0, 1), (1, 0)),
    )


def test_two_forwards_ahead_need_a_buffer():
    """Each rank sends two forwards before it takes the first of the other's."""
    schedule = two_ranks(
        "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 B0.0 B0.1",
        "F1.0 F1.1 F0.0 B0.0 F0.1 B0.1 B1.0 B1.1",
        num_micro_batches=4,
    )
    exchanges = Exchanges(schedule)
    assert len(list(in_order(schedule, exchanges.takes, exchanges.makes))) == 16
    with pytest.raises(ScheduleError) as error:
        verify(schedule)
    assert str(error.value) == (
        "deadlock: rank 0 at step 2 (F1.0), rank 1 at step 2 (F0.0) wait for each other, "
        "if sends block"
    )


def test_one_forward_ahead_finds_its_receive_posted():
    verify(
        two_ranks(
            "F0.0 F1.0 B1.0 B0.0 F0.1 F1.1 B1.1 B0.1",
            "F1.0 F0.0 B0.0 B1.0 F1.1 F0.1 B0.1 B1.1",
            num_micro_batches=4,
        )
    )
