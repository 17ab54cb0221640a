"""Measured costs: what a simulation was given comes back out of its own timeline."""

from __future__ import annotations

import dataclasses

import pytest

from dualray.platform.costs import measured_costs, measured_exchange
from dualray.schedule.actions import Action, Overlap, Schedule
from dualray.schedule.make import KINDS, make_schedule
from dualray.schedule.simulate import Costs, simulate

SPLIT = ("zb1p", "dualpipe", "dualpipev")
"""The schedules in which every stage or its neighbour has I and W apart."""


def ran(schedule: Schedule, costs, *, slower: float = 0.0):
    """Per rank, one worker's steps of one walk, each `slower` than `costs` says."""
    rows = simulate(schedule, costs).rows
    return [[[(str(step), end - start + slower) for step, start, end in row]] for row in rows]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 12)])
def test_what_was_simulated_is_measured(kind: str, ranks: int, micro_batches: int) -> None:
    schedule = make_schedule(kind, ranks, micro_batches)
    for costs in (
        Costs(forward=2.0, input_grad=1.5, weight_grad=1.5, overlapped=4.0),
        Costs(forward=2.0, input_grad=2.5, weight_grad=0.5, overlapped=5.5),
    ):
        measured = measured_costs(ran(schedule, costs), schedule)
        assert len(measured) == schedule.num_stages
        for found in measured:
            assert found.forward == pytest.approx(costs.forward)
            assert found.backward == pytest.approx(costs.backward)
            if kind in SPLIT:
                assert found.input_grad == pytest.approx(costs.input_grad)
            else:
                assert found.input_grad == found.weight_grad
            pairs = any(isinstance(step, Overlap) for steps in schedule.steps for step in steps)
            saved = costs.saving if pairs else 0.0
            assert found.saving == pytest.approx(saved)


@pytest.mark.parametrize("kind", list(KINDS))
def test_stages_that_differ_are_told_apart(kind: str) -> None:
    schedule = make_schedule(kind, 4, 12)
    costs = [
        Costs(forward=f, input_grad=f, weight_grad=0.5 * f, overlapped=2.5 * f)
        for f in (1.0 + 0.5 * stage for stage in range(schedule.num_stages))
    ]
    measured = measured_costs(ran(schedule, costs), schedule)
    for found, expected in zip(measured, costs):
        assert found.forward == pytest.approx(expected.forward)
        assert found.backward == pytest.approx(expected.backward)


def test_of_several_walks_the_median_counts() -> None:
    schedule = make_schedule("dualpipe", 2, 4)
    walks = [ran(schedule, Costs(), slower=late) for late in (0.0, 9.0, 0.1)]
    times = [[[step for walk in walks for step in walk[rank][0]]] for rank in range(2)]
    for found in measured_costs(times, schedule):
        assert found.forward == pytest.approx(1.1)


def test_of_the_workers_at_one_rank_the_slowest_counts_and_of_two_ranks_the_mean() -> None:
    schedule = make_schedule("dualpipe", 2, 4)
    slow = ran(schedule, Costs(), slower=0.4)
    times = ran(schedule, Costs())
    times[0] += slow[0]
    for found in measured_costs(times, schedule):
        # Either stage is held by rank 0, where it takes 1.4, and by rank 1, where it takes 1.
        assert found.forward == pytest.approx(1.2)


def test_weight_gradients_are_matched_in_order() -> None:
    schedule = make_schedule("dualpipe", 2, 4)
    times = ran(schedule, Costs())
    [weight_grad] = [s for s in schedule.steps[0] if isinstance(s, Action) and str(s) == "W"]
    times[0][0] = [(text, 5.0 if text == "W" else d) for text, d in times[0][0]]
    stage = schedule.stage_of[0][weight_grad.direction]
    measured = measured_costs(times, schedule)
    assert measured[stage].weight_grad > measured[1 - stage].weight_grad


def test_full_and_split_backwards_add_up_to_the_measured_work() -> None:
    schedule = make_schedule("dualpipev", 4, 12)
    takes = {"F": 1.0, "B": 2.6, "I": 1.2, "W": 0.7}
    times = [[[(str(s), takes.get(str(s)[0], 3.0)) for s in steps]] for steps in schedule.steps]
    measured = measured_costs(times, schedule)
    work = [0.0] * schedule.num_stages
    for steps, stages in zip(schedule.steps, schedule.stage_of):
        for step in steps:
            if isinstance(step, Action):
                stage = stages[step.direction]
                work[stage] += takes[step.kind] - measured[stage].of(step)
    assert work == pytest.approx([0.0] * schedule.num_stages)
    assert all(found.input_grad > found.weight_grad for found in measured)


def test_pairs_that_ran_in_turn_save_nothing() -> None:
    schedule = make_schedule("dualpipe", 2, 4)
    costs = Costs(forward=1.0, input_grad=1.0, weight_grad=1.0, overlapped=3.0)
    times = []
    for steps in schedule.steps:
        row = []
        for step in steps:
            halves = (step.forward, step.backward) if isinstance(step, Overlap) else (step,)
            row += [(str(half), costs.of(half)) for half in halves]
        times.append([row])
    for found in measured_costs(times, schedule):
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(costs))


def test_the_longer_half_of_a_pair_is_never_hidden() -> None:
    schedule = make_schedule("dualpipe", 2, 4)
    times = ran(schedule, Costs())
    for rank in range(2):
        times[rank][0] = [(t, 0.1 if "&" in t else d) for t, d in times[rank][0]]
    for found in measured_costs(times, schedule):
        assert found.overlapped == pytest.approx(found.backward)


def test_other_steps_than_the_schedule_has_are_our_own_bug() -> None:
    schedule = make_schedule("1f1b", 2, 4)
    times = ran(schedule, Costs())
    times[1][0].pop()
    with pytest.raises(AssertionError, match="nothing was done where the schedule has B0"):
        measured_costs(times, schedule)


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_message_takes_is_measured_where_somebody_waits(kind: str) -> None:
    schedule = make_schedule(kind, 4, 12)
    rows = simulate(schedule, exchange=0.25).rows
    walks = [[[(str(step), start, end) for step, start, end in row]] for row in rows]
    assert measured_exchange(walks, schedule) == pytest.approx(0.25)


def test_clocks_that_differ_cancel() -> None:
    schedule = make_schedule("1f1b", 4, 12)
    rows = simulate(schedule, exchange=0.25).rows
    walks = [[[(str(step), start, end) for step, start, end in row]] for row in rows]
    # A clock that is fast makes every message to it look slow and every one from it quick.
    walks[1] = [[(text, start + 0.1, end + 0.1) for text, start, end in walks[1][0]]]
    assert measured_exchange(walks, schedule) == pytest.approx(0.25)


def test_without_messages_none_takes_time() -> None:
    schedule = make_schedule("1f1b", 1, 3)
    [row] = simulate(schedule).rows
    walk = [(str(step), start, end) for step, start, end in row]
    assert measured_exchange([[walk, walk]], schedule) == 0.0
