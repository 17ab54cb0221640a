"""The simulated bubble against the formula, where the formula holds."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.errors import ConfigError
from dualray.schedule.baselines import one_f_one_b
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.simulate import Costs, simulate


def formula(ranks, costs):
    return (ranks / 2 - 1) * (costs.overlapped + costs.backward - 3 * costs.weight_grad)


@settings(deadline=None, max_examples=60)
@given(
    half=st.integers(1, 8),
    extra=st.integers(0, 12),
    forward=st.integers(1, 8),
    weight=st.integers(0, 8),
    saved=st.integers(0, 8),
)
def test_dualpipe_bubble_equals_the_formula_when_f_is_i_and_w_is_no_longer(
    half, extra, forward, weight, saved
):
    weight = min(weight, forward)
    # The pair costs between its backward alone and both halves in turn.
    costs = Costs(
        forward=forward,
        input_grad=forward,
        weight_grad=weight,
        overlapped=2 * forward + weight - min(saved, forward),
    )
    timeline = simulate(dualpipe(2 * half, 4 * half + 2 * extra), costs)
    assert max(timeline.idle) == formula(2 * half, costs)


@pytest.mark.parametrize(
    ("costs", "sign"),
    [
        (Costs(input_grad=2, overlapped=4), -1),
        (Costs(weight_grad=2, overlapped=4), 1),
        (Costs(forward=2, overlapped=4), 1),
    ],
)
def test_dualpipe_bubble_leaves_the_formula_elsewhere(costs, sign):
    for ranks in (4, 8, 16):
        difference = max(simulate(dualpipe(ranks, 3 * ranks), costs).idle) - formula(ranks, costs)
        assert difference * sign > 0


def test_published_comparison_at_16_ranks():
    def idle(schedule, overlapped):
        return max(simulate(schedule, Costs(overlapped=overlapped)).idle)

    assert idle(one_f_one_b(16, 40), 3) == 45
    assert idle(dualpipe(16, 40), 3) == 14
    assert idle(dualpipe(16, 40), 2) == 7


def test_timeline_of_the_smallest_dualpipe():
    timeline = simulate(dualpipe(2, 4))
    assert timeline.makespan == 12
    assert timeline.idle == (0, 0)
    assert timeline.bubble == 0
    assert timeline.peaks.activations == (3, 3)
    assert [(str(step), start, end) for step, start, end in timeline.rows[0]][3:6] == [
        ("B1.0", 3, 5),
        ("F1.1&B0.0", 5, 8),
        ("B1.1", 8, 10),
    ]


def test_steps_of_a_rank_never_overlap_and_inputs_come_first():
    timeline = simulate(one_f_one_b(3, 4), Costs(forward=1, input_grad=1, weight_grad=0.5))
    for row in timeline.rows:
        assert all(end <= start for (_, _, end), (_, start, _) in pairwise(row))
    starts = [{str(step): start for step, start, _ in row} for row in timeline.rows]
    ends = [{str(step): end for step, _, end in row} for row in timeline.rows]
    for micro_batch in range(4):
        for rank in (0, 1):
            assert starts[rank + 1][f"F0.{micro_batch}"] >= ends[rank][f"F0.{micro_batch}"]
            assert starts[rank][f"B0.{micro_batch}"] >= ends[rank + 1][f"B0.{micro_batch}"]
    assert timeline.bubble == pytest.approx(sum(timeline.idle) / (3 * timeline.makespan))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_weight_gradient_may_take_no_time_but_not_less(value):
    assert Costs(weight_grad=0).backward == 1
    with pytest.raises(ConfigError) as error:
        Costs(weight_grad=value)
    assert str(error.value) == (
        f"costs.weight_grad is {value} and must be a finite duration of at least 0 "
        "(0: a backward has no part to defer); give four durations in one unit, such as 1,1,1,3."
    )


@pytest.mark.parametrize("field", ["forward", "input_grad", "overlapped"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_every_other_duration_is_positive(field, value):
    with pytest.raises(ConfigError) as error:
        Costs(**{field: value})
    assert str(error.value) == (
        f"costs.{field} is {value} and must be a finite duration above 0; "
        "give four durations in one unit, such as 1,1,1,3."
    )
