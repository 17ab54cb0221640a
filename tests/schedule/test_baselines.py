"""1F1B against an independent generator and the published bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Action, Kind
from dualray.schedule.baselines import one_f_one_b
from dualray.schedule.simulate import Costs, simulate
from dualray.schedule.verify import verify


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 16), st.integers(1, 40))
def test_complete_and_within_memory(ranks, chunks):
    peaks = verify(one_f_one_b(ranks, chunks))
    assert peaks.activations == tuple(min(ranks - rank, chunks) for rank in range(ranks))
    assert peaks.deferred == (0,) * ranks


def test_one_rank_alternates_forward_and_backward():
    assert " ".join(map(str, one_f_one_b(1, 3).steps[0])) == "F0.0 B0.0 F0.1 B0.1 F0.2 B0.2"


@pytest.mark.parametrize(("ranks", "chunks"), [(1, 3), (2, 4), (4, 8), (8, 16)])
def test_order_equals_torch_pipelining(ranks, chunks):
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    kinds = {
        schedules._ComputationType.FORWARD: Kind.FORWARD,
        schedules._ComputationType.FULL_BACKWARD: Kind.BACKWARD,
    }
    ours = one_f_one_b(ranks, chunks)
    for rank in range(ranks):
        # The interleaved generator with one stage a rank is plain 1F1B.
        warm_up = ranks - 1 - rank
        operations = schedules._get_1f1b_rank_ops(
            1, ranks, warm_up, chunks - warm_up, warm_up, rank, lambda _: 0, lambda _: 0
        )
        theirs = tuple(
            Action(kinds[op.computation_type], 0, op.microbatch_index)
            for op in operations
            if op is not None
        )
        assert ours.steps[rank] == theirs


@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
def test_bubble_is_the_published_one(ranks):
    costs = Costs(forward=2, input_grad=1.5, weight_grad=1)
    idle = simulate(one_f_one_b(ranks, 2 * ranks), costs).idle
    assert idle == pytest.approx([(ranks - 1) * (2 + 2.5)] * ranks)
