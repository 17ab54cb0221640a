"""Positions along a micro-batch's way, for one stream, two streams and a V."""

from dualray.schedule.baselines import one_f_one_b
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev
from dualray.schedule.exchanges import Exchanges, in_order
from dualray.schedule.forward_only import forward_only


def way(schedule, direction):
    """The (rank, direction) positions that a micro-batch of `direction` passes, from its entry."""
    at = schedule.position_of(direction, 0)
    positions = [at]
    while (after := schedule.downstream(*at)) is not None:
        assert schedule.upstream(*after) == at
        positions.append(at := after)
    assert schedule.upstream(*positions[0]) is None
    return positions


def test_one_stream():
    schedule = one_f_one_b(3, 5)
    assert way(schedule, 0) == [(0, 0), (1, 0), (2, 0)]
    assert (schedule.entries, schedule.entry_of(0), schedule.micro_batches_of(0)) == ((0,), 0, 5)


def test_two_streams():
    schedule = dualpipe(4, 10)
    assert way(schedule, 0) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert way(schedule, 1) == [(3, 1), (2, 1), (1, 1), (0, 1)]
    assert schedule.entries == (0, 1)
    assert [schedule.entry_of(direction) for direction in (0, 1)] == [0, 1]
    assert [schedule.micro_batches_of(direction) for direction in (0, 1)] == [5, 5]


def test_two_legs():
    schedule = dualpipev(3, 7)
    positions = [(0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1)]
    assert way(schedule, 0) == way(schedule, 1) == positions
    assert [schedule.stage_of[rank][direction] for rank, direction in positions] == [*range(6)]
    assert schedule.entries == (0,)
    assert [schedule.entry_of(direction) for direction in (0, 1)] == [0, 0]
    assert [schedule.micro_batches_of(direction) for direction in (0, 1)] == [7, 7]


def test_without_backwards_both_legs_run_in_order():
    schedule = forward_only(dualpipev(3, 7), 4)
    exchanges = Exchanges(schedule)
    order = list(in_order(schedule, exchanges.takes, exchanges.makes))
    assert len(order) == 4 * 6
    assert [str(action) for action in schedule.steps[2][:5]] == (
        ["F0.0", "F0.1", "F1.0", "F0.2", "F1.1"]
    )
