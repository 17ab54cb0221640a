"""Our orders against torch.distributed.pipelining's, action for action.

Its generators ask their schedule object for two or three numbers only, so a stand-in with
those numbers is enough: no stages, no process group.
"""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from dualray.schedule.actions import Action, Kind, Overlap
from dualray.schedule.baselines import gpipe, one_f_one_b, zb1p
from dualray.schedule.dualpipev import dualpipev

SIZES = [(1, 1), (1, 3), (2, 4), (3, 6), (3, 10), (4, 8), (5, 11), (8, 20), (16, 40)]
KINDS = {
    schedules._ComputationType.FORWARD: Kind.FORWARD,
    schedules._ComputationType.FULL_BACKWARD: Kind.BACKWARD,
    schedules._ComputationType.BACKWARD_INPUT: Kind.INPUT_GRAD,
    schedules._ComputationType.BACKWARD_WEIGHT: Kind.WEIGHT_GRAD,
}


def translated(theirs, stages):
    """Their actions of one rank in our words; `stages` are those that the rank holds."""
    steps = []
    for action in theirs:
        if action is None or action.computation_type is schedules._ComputationType.REDUCE_GRAD:
            continue  # waiting, and what our executor does after the last step
        if action.sub_actions:
            steps.append(Overlap(*translated(action.sub_actions, stages)))
        else:
            direction = stages.index(action.stage_index)
            kind = KINDS[action.computation_type]
            steps.append(Action(kind, direction, action.microbatch_index))
    return tuple(steps)


def assert_equal_orders(ours, theirs_of):
    for rank, steps in enumerate(ours.steps):
        assert steps == translated(theirs_of(rank), ours.stage_of[rank])


@pytest.mark.parametrize(("ranks", "chunks"), SIZES)
def test_gpipe(ranks, chunks):
    stand_in = SimpleNamespace(_num_stages=ranks, _n_microbatches=chunks)
    theirs = schedules.ScheduleGPipe._get_pipeline_order(stand_in)
    assert_equal_orders(gpipe(ranks, chunks), theirs.__getitem__)


@pytest.mark.parametrize(("ranks", "chunks"), SIZES)
def test_1f1b(ranks, chunks):
    """Schedule1F1B itself lists its order for drawings only, with the last rank's off by one."""

    def theirs(rank):
        # The interleaved generator with one stage a rank is plain 1F1B.
        warm_up = ranks - 1 - rank
        return schedules._get_1f1b_rank_ops(
            1, ranks, warm_up, chunks - warm_up, warm_up, rank, lambda _: rank, lambda _: rank
        )

    assert_equal_orders(one_f_one_b(ranks, chunks), theirs)
    stand_in = SimpleNamespace(_num_stages=ranks, _n_microbatches=chunks)
    listed = schedules.Schedule1F1B._get_pipeline_order(stand_in)
    for rank, steps in enumerate(one_f_one_b(ranks, chunks).steps[:-1]):
        assert steps == translated(listed[rank], (rank,))


@pytest.mark.parametrize(("ranks", "chunks"), SIZES)
def test_zb1p(ranks, chunks):
    stand_in = SimpleNamespace(
        n_local_stages=1,
        pp_group_size=ranks,
        microbatches_per_round=ranks,
        _n_microbatches=chunks,
    )
    generate = schedules.ScheduleInterleavedZeroBubble._calculate_single_rank_operations
    assert_equal_orders(zb1p(ranks, chunks), lambda rank: generate(stand_in, rank))


@pytest.mark.parametrize(("ranks", "chunks"), SIZES[1:])
def test_dualpipev(ranks, chunks):
    stand_in = SimpleNamespace(pp_group_size=ranks, _n_microbatches=chunks)
    generate = schedules.ScheduleDualPipeV._calculate_single_rank_operations
    assert_equal_orders(dualpipev(ranks, chunks), lambda rank: generate(stand_in, rank))
