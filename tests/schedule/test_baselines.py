"""GPipe, 1F1B and ZB1P against the published bounds; torch's orders are in their own test."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Kind
from dualray.schedule.baselines import gpipe, one_f_one_b, zb1p
from dualray.schedule.simulate import Costs, simulate
from dualray.schedule.verify import verify

SIZES = {"ranks": st.integers(1, 16), "chunks": st.integers(1, 40)}


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_gpipe_holds_everything(ranks, chunks):
    peaks = verify(gpipe(ranks, chunks))
    assert peaks.activations == (chunks,) * ranks
    assert peaks.deferred == (0,) * ranks


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_1f1b_holds_as_many_as_ranks_follow(ranks, chunks):
    peaks = verify(one_f_one_b(ranks, chunks))
    assert peaks.activations == tuple(min(ranks - rank, chunks) for rank in range(ranks))
    assert peaks.deferred == (0,) * ranks


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_zb1p_holds_no_more_than_1f1b_at_most(ranks, chunks):
    schedule = zb1p(ranks, chunks)
    peaks = verify(schedule)
    assert peaks.activations == tuple(min(ranks - rank, chunks) for rank in range(ranks))
    assert peaks.deferred == tuple(min(rank + 1, chunks) for rank in range(ranks))
    # Activations stay until their weight gradient has run: together never more than 1F1B's P.
    for steps in schedule.steps:
        held = 0
        for step in steps:
            held += {Kind.FORWARD: 1, Kind.WEIGHT_GRAD: -1}.get(step.kind, 0)
            assert held <= min(ranks, chunks)
        assert held == 0


def test_one_rank_never_waits():
    assert " ".join(map(str, gpipe(1, 2).steps[0])) == "F0.0 F0.1 B0.0 B0.1"
    assert " ".join(map(str, one_f_one_b(1, 2).steps[0])) == "F0.0 B0.0 F0.1 B0.1"
    assert " ".join(map(str, zb1p(1, 2).steps[0])) == "F0.0 I0.0 W F0.1 I0.1 W"


def test_zb1p_defers_by_rank():
    assert [" ".join(map(str, steps)) for steps in zb1p(3, 4).steps] == [
        "F0.0 F0.1 F0.2 I0.0 W F0.3 I0.1 W I0.2 W I0.3 W",
        "F0.0 F0.1 I0.0 F0.2 I0.1 W F0.3 I0.2 W I0.3 W W",
        "F0.0 I0.0 F0.1 I0.1 F0.2 I0.2 W F0.3 I0.3 W W W",
    ]


@pytest.mark.parametrize("generate", [gpipe, one_f_one_b])
@pytest.mark.parametrize("ranks", [1, 2, 5, 16])
@pytest.mark.parametrize("per_rank", [1, 2])
def test_bubble_of_gpipe_and_1f1b(generate, ranks, per_rank):
    costs = Costs(forward=2, input_grad=1.5, weight_grad=1)
    idle = simulate(generate(ranks, per_rank * ranks), costs).idle
    assert idle == pytest.approx([(ranks - 1) * (2 + 2.5)] * ranks)


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.integers(1, 16),
    extra=st.integers(0, 20),
    forward=st.integers(1, 8),
    input_grad=st.integers(1, 8),
    weight=st.integers(0, 8),
)
def test_bubble_of_zb1p_when_w_is_no_longer_than_f_and_i(ranks, extra, forward, input_grad, weight):
    weight = min(weight, forward, input_grad)
    costs = Costs(forward=forward, input_grad=input_grad, weight_grad=weight)
    idle = simulate(zb1p(ranks, ranks + extra), costs).idle
    assert max(idle) == (ranks - 1) * (forward + costs.backward - 2 * weight)


def test_bubble_of_zb1p_leaves_the_formula_elsewhere():
    # A longer W holds up the chain of forwards or of input gradients.
    for costs in (Costs(weight_grad=2), Costs(forward=3, weight_grad=2)):
        formula = 7 * (costs.forward + costs.backward - 2 * costs.weight_grad)
        assert max(simulate(zb1p(8, 16), costs).idle) > formula
    # With fewer micro-batches than ranks there is too little to fill the gaps with.
    assert max(simulate(zb1p(8, 7)).idle) > 7
