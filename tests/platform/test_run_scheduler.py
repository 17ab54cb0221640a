"""The scheduler over a made-up machine whose costs are known, and may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import tiny_config

from dualray.errors import ConfigError
from dualray.parallel.layout import Layout
from dualray.platform.scheduler import Observation, Scheduler, SchedulerConfig
from dualray.platform.scheduling.candidates import Measured, forecast, rank
from dualray.platform.scheduling.choice import Choice, Situation
from dualray.platform.scheduling.layer_costs import Part, Sized, at_size, parts_of, stages_of
from dualray.platform.scheduling.table import decision_lines
from dualray.schedule.make import make_schedule
from dualray.schedule.simulate import Costs, simulate

SITUATION = Situation(
    model=tiny_config(num_hidden_layers=16, num_nextn_predict_layers=1),
    layout=Layout(pipeline=4, experts=2, schedule="1f1b"),
    seq_len=32,
    dtype="float32",
    recompute=True,
    memory_bytes=float("inf"),
)
EVEN = Choice(schedule="1f1b", layers=(4, 4, 4, 4), micro_batch_size=1, micro_batches=16)
CONFIG = SchedulerConfig(warmup_steps=1, measure_steps=2, check_every=6)


class Machine:
    """Layers of 1 ms a sequence and part; a head of `head` layers, a start of `fixed` ms."""

    def __init__(self, *, head: float = 1.0, fixed: float = 0.0, saving: float = 0.0) -> None:
        self.head, self.fixed, self.saving = head, fixed, saving

    def stage_costs(self, choice: Choice) -> list[Costs]:
        costs = []
        for stage, layers in enumerate(choice.layers):
            last = stage == len(choice.layers) - 1
            work = (layers + self.head * last) * (choice.micro_batch_size + self.fixed) * 1e-3
            costs.append(
                Costs(
                    forward=work,
                    input_grad=work,
                    weight_grad=work,
                    overlapped=(3 - self.saving) * work,
                )
            )
        return costs

    def step(self, scheduler: Scheduler):
        """One step as the scheduler wants it."""
        observation = None
        if scheduler.wants_costs:
            costs = self.stage_costs(scheduler.next_choice)
            observation = Observation(costs=costs, exchange_s=0.0, optimizer_s=2e-3)
        return scheduler.saw(observation)

    def until_decided(self, scheduler: Scheduler, limit: int = 50):
        for _ in range(limit):
            decision = self.step(scheduler)
            if decision is not None:
                return decision
        raise AssertionError("no decision")

    def step_time(self, choice: Choice) -> float:
        schedule = make_schedule(choice.schedule, 4, choice.micro_batches)
        return simulate(schedule, self.stage_costs(choice)).makespan + 2e-3


def scheduler(choice: Choice = EVEN, situation: Situation = SITUATION, **config) -> Scheduler:
    return Scheduler(replace(CONFIG, **config), situation, choice, decided=False)


def test_measures_both_sizes_with_warm_up_and_then_decides() -> None:
    watched, machine = scheduler(), Machine()
    sizes, counted = [], []
    decision = None
    while decision is None:
        sizes.append(watched.next_choice.micro_batch_size)
        counted.append(watched.wants_costs)
        assert watched.next_choice.micro_batches * sizes[-1] == 16
        assert watched.is_measuring
        decision = machine.step(watched)
    assert sizes == [1, 1, 1, 2, 2, 2]
    assert counted == [False, True, True] * 2
    assert not watched.is_measuring
    assert watched.choice == watched.next_choice == decision.choice


def test_the_size_is_pinned_on_request() -> None:
    watched = scheduler(tune_micro_batch_size=False)
    decision = Machine().until_decided(watched)
    assert {each.choice.micro_batch_size for each in decision.ranked} == {1}


def test_what_it_forecasts_is_what_the_machine_then_takes() -> None:
    machine = Machine(head=4.0, fixed=0.5, saving=0.5)
    decision = machine.until_decided(scheduler())
    assert decision.before.step_s == pytest.approx(machine.step_time(EVEN))
    # Sizes are on one line here, and only a stage's division into layers is estimated.
    assert decision.after.step_s == pytest.approx(machine.step_time(decision.choice), rel=0.1)
    assert machine.step_time(decision.choice) < 0.8 * machine.step_time(EVEN)
    times = [each.step_s for each in decision.ranked]
    assert times == sorted(times)
    kinds = {each.choice.schedule for each in decision.ranked}
    assert kinds == {"gpipe", "1f1b", "zb1p", "dualpipev", "dualpipe"}


def test_fixed_costs_call_for_larger_micro_batches_and_their_absence_for_smaller_ones() -> None:
    start = replace(EVEN, micro_batch_size=2, micro_batches=16)
    costly = Machine(fixed=8.0).until_decided(scheduler(start)).choice
    free = Machine(fixed=0.0).until_decided(scheduler(start)).choice
    assert costly.micro_batch_size > 2 > free.micro_batch_size
    assert costly.micro_batches * costly.micro_batch_size == 32


def test_a_heavy_head_gets_fewer_layers_unless_the_cut_is_pinned() -> None:
    machine = Machine(head=3.0)
    decision = machine.until_decided(scheduler(schedules=("1f1b",), tune_micro_batch_size=False))
    assert decision.choice.layers[-1] < 4
    assert sum(decision.choice.layers) == 16
    pinned = replace(SITUATION, layout=replace(SITUATION.layout, layers=EVEN.layers))
    decision = machine.until_decided(scheduler(situation=pinned))
    assert decision.choice.layers == EVEN.layers


def test_what_does_not_fit_is_last_and_not_taken() -> None:
    machine = Machine(saving=1.0)
    free = machine.until_decided(scheduler())
    # The fullest that was chosen freely is just too much now.
    limit = 0.999 * free.after.memory_bytes
    tight = machine.until_decided(scheduler(situation=replace(SITUATION, memory_bytes=limit)))
    assert tight.choice != free.choice
    assert tight.after.memory_bytes <= limit
    fitting = [each.fits for each in tight.ranked]
    assert fitting == sorted(fitting, reverse=True)
    assert not all(fitting)
    nothing = machine.until_decided(scheduler(situation=replace(SITUATION, memory_bytes=1.0)))
    assert nothing.choice == EVEN
    assert nothing.reason == ("stays: nothing else exists for these numbers and fits into memory")


def test_a_small_gain_is_not_worth_a_change() -> None:
    machine = Machine()
    gain = 1 - machine.until_decided(scheduler()).after.step_s / machine.step_time(EVEN)
    decision = machine.until_decided(scheduler(min_gain=gain + 0.01))
    assert decision.choice == EVEN
    assert decision.reason.startswith("stays: the fastest gains")


def test_a_schedule_that_is_not_asked_for_is_left() -> None:
    decision = Machine().until_decided(scheduler(schedules=("gpipe",), min_gain=0.5))
    assert decision.choice.schedule == "gpipe"


def test_drifted_costs_are_measured_again_and_steady_ones_are_not() -> None:
    watched, machine = scheduler(tune_micro_batch_size=False), Machine()
    machine.until_decided(watched)
    for _ in range(30):
        assert machine.step(watched) is None
        assert not watched.is_measuring
    # All twice as slow: the same shares.
    slow = Machine(fixed=1.0)
    for _ in range(12):
        assert slow.step(watched) is None
        assert not watched.is_measuring
    heavy = Machine(head=8.0)
    before = watched.choice
    decision = heavy.until_decided(watched)
    assert decision.choice != before
    assert heavy.step_time(decision.choice) < heavy.step_time(before)


def test_one_odd_step_is_no_drift() -> None:
    watched, machine = scheduler(tune_micro_batch_size=False, measure_steps=3), Machine()
    machine.until_decided(watched)
    odd = Machine(head=8.0)
    for step in range(36):
        (odd if step % 6 == 3 else machine).step(watched)
        assert not watched.is_measuring


def test_a_resumed_run_goes_on_with_its_decision() -> None:
    watched = Scheduler(CONFIG, SITUATION, EVEN, decided=True)
    assert not watched.is_measuring
    assert watched.next_choice == EVEN


def test_the_table_says_what_was_chosen_and_why() -> None:
    decision = Machine(saving=0.5).until_decided(scheduler())
    lines = decision_lines(decision, step=6)
    assert lines[0] == f"scheduler after step 6: {decision.reason}"
    assert lines[1].split() == ["schedule", "layers", "micro-batches", "step", "bubble", "memory"]
    (chosen,) = [line for line in lines if line.endswith("<- chosen")]
    assert chosen.split()[0] == decision.choice.schedule
    assert "+".join(map(str, decision.choice.layers)) in chosen
    assert sum("(until now)" in line for line in lines) == 1


@settings(deadline=None, max_examples=50)
@given(
    cut=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    costs=st.data(),
)
def test_parts_add_up_to_what_was_measured(cut, costs) -> None:
    model = tiny_config(num_hidden_layers=sum(cut))
    duration = st.floats(1e-3, 1.0)
    measured = []
    for _ in cut:
        forward, input_grad, weight_grad = (costs.draw(duration) for _ in range(3))
        saved = costs.draw(st.floats(0, 1)) * min(forward, input_grad + weight_grad)
        overlapped = forward + input_grad + weight_grad - saved
        measured.append(
            Costs(
                forward=forward,
                input_grad=input_grad,
                weight_grad=weight_grad,
                overlapped=overlapped,
            )
        )
    parts = parts_of(measured, cut, model, seq_len=16)
    assert len(parts) == sum(cut) + 1
    for stage, cost in zip(stages_of(parts, cut), measured):
        assert stage.forward == pytest.approx(cost.forward)
        assert stage.input_grad == pytest.approx(cost.input_grad)
        assert stage.weight_grad == pytest.approx(cost.weight_grad)
        # A stage of the dense first layer alone exchanges nothing that could be hidden.
        if stage.saving:
            assert stage.costs.overlapped == pytest.approx(cost.overlapped)


@given(first=st.floats(1e-3, 1), second=st.floats(1e-3, 1), size=st.sampled_from([1, 2, 3, 4, 8]))
def test_sizes_lie_on_a_line_without_negative_start_or_slope(first, second, size) -> None:
    sizes = [Sized(size=x, parts=[Part(forward=y)]) for x, y in ((2, first), (4, second))]
    (part,) = at_size(sizes, size)
    assert part.forward >= 0
    (larger,) = at_size(sizes, size + 1)
    assert larger.forward >= part.forward - 1e-12
    if first <= second <= 2 * first:
        (there,) = at_size(sizes, 4)
        assert there.forward == pytest.approx(second)


def test_candidates_keep_the_step_s_sequences_and_exist() -> None:
    parts = [Part(forward=1e-3, input_grad=1e-3, weight_grad=1e-3)] * 17
    sizes = (Sized(size=1, parts=parts), Sized(size=2, parts=parts))
    measured = Measured(sizes=sizes, exchange_s=0.0, optimizer_s=0.0)
    found = rank(EVEN, SITUATION, measured, schedules=("zb1p", "dualpipev"), cuts=True)
    for each in found:
        choice = each.choice
        schedule = make_schedule(choice.schedule, 4, choice.micro_batches)
        assert choice.micro_batches * choice.micro_batch_size == 16
        assert len(choice.layers) == schedule.num_stages
        assert sum(choice.layers) == 16
        assert min(choice.layers) >= 1
        again = forecast(choice, SITUATION, measured)
        assert again == each
    # One stage too many for the layers: dualpipev of 4 ranks has 8.
    short = replace(SITUATION, model=tiny_config(num_hidden_layers=7))
    few = replace(EVEN, layers=(2, 2, 2, 1))
    kinds = {
        each.choice.schedule
        for each in rank(
            few,
            short,
            replace(measured, sizes=(Sized(size=1, parts=parts[:8]),)),
            schedules=("zb1p", "dualpipev"),
            cuts=True,
        )
    }
    assert kinds == {"zb1p"}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"schedules": ("zb2p",)},
            "scheduler.schedules is ['zb2p'] and must name one or more of gpipe, 1f1b, zb1p, "
            "dualpipev, dualpipe; leave it out to choose from all.",
        ),
        (
            {"measure_steps": 0},
            "scheduler.measure_steps is 0 and must be at least 1; set scheduler.measure_steps to 1 "
            "or more.",
        ),
        (
            {"min_gain": -0.1},
            "scheduler.min_gain is -0.1 and must be at least 0; set scheduler.min_gain to 0 or "
            "more.",
        ),
        (
            {"memory_bytes": 0},
            "scheduler.memory_bytes is 0 and must be above 0; leave it out to take what the device "
            "has.",
        ),
    ],
)
def test_mistakes(values, sentence) -> None:
    with pytest.raises(ConfigError) as error:
        SchedulerConfig(**values)
    assert str(error.value) == sentence
