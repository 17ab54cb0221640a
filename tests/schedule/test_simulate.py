"""The simulated bubble against the formula, where the formula holds."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.errors import ConfigError
from dualray.schedule.baselines import one_f_one_b, zb1p
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs, paired, simulate


def formula(stages, costs):
    return (stages / 2 - 1) * (costs.overlapped + costs.backward - 3 * costs.weight_grad)


@st.composite
def even_costs(draw):
    """F = I and W no longer, and a pair between its backward alone and both halves in turn."""
    forward = draw(st.integers(1, 8))
    weight = draw(st.integers(0, forward))
    return Costs(
        forward=forward,
        input_grad=forward,
        weight_grad=weight,
        overlapped=2 * forward + weight - draw(st.integers(0, forward)),
    )


@settings(deadline=None, max_examples=60)
@given(half=st.integers(1, 8), extra=st.integers(0, 12), costs=even_costs())
def test_dualpipe_bubble_equals_the_formula_when_f_is_i_and_w_is_no_longer(half, extra, costs):
    timeline = simulate(dualpipe(2 * half, 4 * half + 2 * extra), costs)
    assert max(timeline.idle) == formula(2 * half, costs)


@settings(deadline=None, max_examples=60)
@given(ranks=st.integers(1, 16), extra=st.integers(0, 12), costs=even_costs())
def test_dualpipev_bubble_equals_the_formula_of_its_stages(ranks, extra, costs):
    timeline = simulate(dualpipev(ranks, 2 * ranks + extra), costs)
    assert max(timeline.idle) == formula(2 * ranks, costs)


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
    assert idle(zb1p(16, 40), 3) == 15
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


def test_equal_stages_are_one_table():
    table = Costs(forward=0.3, input_grad=0.7, weight_grad=0.1, overlapped=0.9)
    for kind in KINDS:
        schedule = make_schedule(kind, 4, 9 if kind == "dualpipev" else 10)
        assert simulate(schedule, [table] * schedule.num_stages) == simulate(schedule, table)


def test_a_pair_of_two_stages_takes_the_mean_of_what_each_hides():
    slow = Costs(forward=4, input_grad=3, weight_grad=3, overlapped=6)  # hides 4
    quick = Costs(forward=1, input_grad=1, weight_grad=1, overlapped=3)  # hides nothing
    assert paired(slow, slow) == 6
    assert paired(quick, quick) == 3
    assert paired(slow, quick) == 4 + 2 - 2
    assert paired(quick, slow) == 1 + 6 - 2 - -1  # the slow backward alone takes 6
    rows = simulate(dualpipe(2, 4), [slow, quick]).rows
    pairs = {str(step): end - start for row in rows for step, start, end in row if "&" in str(step)}
    # Rank 0 holds the slow stage for direction 0, rank 1 for direction 1.
    assert pairs == {"F1.1&B0.0": paired(quick, slow), "F0.1&B1.0": paired(quick, slow)}


def test_the_slowest_stage_sets_the_pace():
    stages = [Costs(), Costs(forward=3, input_grad=2, weight_grad=2), Costs()]
    timeline = simulate(one_f_one_b(3, 50), stages)
    # The slow rank idles only before its first input and while rank 0 does the last backward.
    assert timeline.idle[1] == 1 + 2
    assert timeline.makespan == 50 * 7 + timeline.idle[1]


def test_an_exchange_delays_the_neighbour_and_occupies_nobody():
    timeline = simulate(one_f_one_b(2, 2), exchange=0.5)
    assert [(str(step), start, end) for step, start, end in timeline.rows[1]] == [
        ("F0.0", 1.5, 2.5),
        ("B0.0", 2.5, 4.5),
        ("F0.1", 4.5, 5.5),
        ("B0.1", 5.5, 7.5),
    ]
    assert [(str(step), start, end) for step, start, end in timeline.rows[0]] == [
        ("F0.0", 0, 1),
        ("F0.1", 1, 2),
        ("B0.0", 5, 7),
        ("B0.1", 8, 10),
    ]


def test_the_turn_of_a_v_costs_no_exchange():
    timeline = simulate(dualpipev(2, 4), exchange=0.5)
    starts = {str(step): start for step, start, _ in timeline.rows[1]}
    assert (starts["F0.0"], starts["F1.0"]) == (1.5, 2.5)


def test_costs_must_be_as_many_as_stages():
    with pytest.raises(AssertionError):
        simulate(dualpipev(2, 4), [Costs()] * 2)
    with pytest.raises(AssertionError):
        simulate(dualpipev(2, 4), exchange=-1)


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
