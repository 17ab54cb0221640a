"""The verifier finds every way to spoil a schedule, and says which rule broke."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.schedule.actions import Action, Kind, Overlap, Schedule
from dualray.schedule.baselines import gpipe, one_f_one_b, zb1p
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev
from dualray.schedule.exchanges import ScheduleError
from dualray.schedule.memory import peaks_of
from dualray.schedule.verify import verify


def spoil(schedule, rank, edit):
    """`schedule` after `edit(steps)` on one rank's list, without memory promises."""
    steps = list(schedule.steps[rank])
    edit(steps)
    rows = (*schedule.steps[:rank], tuple(steps), *schedule.steps[rank + 1 :])
    return replace(schedule, steps=rows, max_activations=(), max_deferred=())


def sentence(schedule):
    with pytest.raises(ScheduleError) as error:
        verify(schedule)
    return str(error.value)


def index_of(schedule, rank, text):
    return [str(step) for step in schedule.steps[rank]].index(text)


def remover(schedule, rank, text):
    at = index_of(schedule, rank, text)
    return spoil(schedule, rank, lambda steps: steps.pop(at))


def put(schedule, rank, text, *steps_in_place):
    at = index_of(schedule, rank, text)
    return spoil(schedule, rank, lambda steps: steps.__setitem__(slice(at, at + 1), steps_in_place))


ONE = one_f_one_b(2, 4)
DUAL = dualpipe(4, 10)
FOLDED = dualpipev(3, 7)


def test_missing_forward_backward_and_weight_gradient():
    assert sentence(remover(ONE, 0, "F0.2")) == "rank 0 never runs F0.2"
    assert sentence(remover(ONE, 1, "B0.3")) == "rank 1 never runs B0.3 or I0.3"
    assert sentence(remover(DUAL, 0, "W")) == "rank 0 runs I1.0 and never its W"


def test_duplicates():
    forward = Action(Kind.FORWARD, 0, 1)
    assert sentence(put(ONE, 0, "F0.1", forward, forward)) == "rank 0 runs F0.1 2 times"
    twice = (Action(Kind.BACKWARD, 0, 0), Action(Kind.INPUT_GRAD, 0, 0))
    assert sentence(put(ONE, 0, "B0.0", *twice)) == "rank 0 runs both B0.0 and I0.0"
    extra_w = (Action(Kind.BACKWARD, 0, 0), Action(Kind.WEIGHT_GRAD, 0, 0))
    assert sentence(put(ONE, 0, "B0.0", *extra_w)) == "rank 0 runs B0.0 and also a W for it"


def test_what_does_not_exist():
    assert sentence(put(ONE, 0, "F0.3", Action(Kind.FORWARD, 0, 4))) == (
        "rank 0 runs F0.4, which does not exist"
    )
    assert sentence(put(ONE, 0, "F0.3", Action(Kind.FORWARD, 1, 3))) == (
        "rank 0 runs F1.3, which does not exist"
    )


def test_backward_before_its_forward():
    def edit(steps):
        steps[0], steps[1] = steps[1], steps[0]

    assert sentence(spoil(ONE, 1, edit)) == "rank 1 step 0: B0.0 before its forward"


def test_weight_gradient_must_be_the_oldest_queued():
    newer = Action(Kind.WEIGHT_GRAD, 0, 4)

    def swap(steps):
        steps[-1], steps[-2] = steps[-2], steps[-1]

    assert sentence(spoil(DUAL, 1, swap)) == "rank 1 step 15: W0.4, but the oldest is W1.4"

    def early(steps):
        steps.remove(newer)
        steps.insert(0, newer)

    assert sentence(spoil(DUAL, 1, early)) == "rank 1 step 0: W0.4, but none is queued"


def test_pair_of_one_micro_batch():
    def edit(steps):
        at = next(i for i, step in enumerate(steps) if isinstance(step, Overlap))
        steps[at] = Overlap(steps[at].backward, steps[at].forward)

    assert sentence(spoil(DUAL, 1, edit)) == (
        "rank 1 step 6: B0.0&F1.2 does not pair a forward with another micro-batch's backward"
    )


def test_channel_order_differs():
    def edit(steps):
        steps[0], steps[1] = steps[1], steps[0]

    assert sentence(spoil(ONE, 0, edit)) == (
        "channel F0 from rank 0 to rank 1: message 0 is micro-batch 1, expected 0"
    )

    def swap_last(steps):
        steps[-1], steps[-2] = steps[-2], steps[-1]

    assert sentence(spoil(ONE, 0, swap_last)) == (
        "channel B0 from rank 1 to rank 0: message 2 is micro-batch 2, expected 3"
    )


def test_channels_of_a_v_lead_from_leg_to_leg():
    def edit(steps):
        steps[0], steps[1] = steps[1], steps[0]

    assert sentence(spoil(FOLDED, 1, edit)) == (
        "channel F0 from rank 0 to rank 1: message 0 is micro-batch 0, expected 1"
    )


def test_the_turn_of_a_v_hands_over_within_a_rank():
    at = index_of(FOLDED, 2, "F0.0"), index_of(FOLDED, 2, "F1.0")

    def late_forward(steps):
        steps[at[0]], steps[at[1]] = steps[at[1]], steps[at[0]]

    assert sentence(spoil(FOLDED, 2, late_forward)) == (
        "rank 2 step 0: F1.0 before F0.0, which hands over to it"
    )

    def early_backward(steps):
        steps.remove(Action(Kind.BACKWARD, 1, 0))
        steps.insert(index_of(FOLDED, 2, "F1.3&B0.0"), Action(Kind.BACKWARD, 1, 0))

    assert sentence(spoil(FOLDED, 2, early_backward)) == (
        "rank 2 step 7: F1.3&B0.0 before B1.0, which hands over to it"
    )


def test_deadlock_names_every_waiting_rank():
    # Locally fine and in channel order, but each end waits for the other's first message.
    steps = []
    for near in (0, 1):
        order = [(Kind.FORWARD, 1 - near), (Kind.FORWARD, near)]
        order += [(Kind.BACKWARD, 1 - near), (Kind.BACKWARD, near)]
        steps.append(tuple(Action(kind, direction, 0) for kind, direction in order))
    crossed = Schedule(
        kind="crossed",
        num_ranks=2,
        num_stages=2,
        num_micro_batches=2,
        steps=tuple(steps),
        stage_of=((0, 1), (1, 0)),
    )
    assert sentence(crossed) == (
        "deadlock: rank 0 at step 0 (F1.0), rank 1 at step 0 (F0.0) wait for each other"
    )


def test_memory_promises_are_held():
    tight = replace(DUAL, max_activations=(5, 4, 5, 5))
    assert sentence(tight) == "rank 1 holds 5 live micro-batches and promised 4"
    tight = replace(DUAL, max_deferred=(1, 1, 2, 1))
    assert sentence(tight) == "rank 1 holds 2 queued weight gradients and promised 1"


def test_a_pair_holds_both_of_its_micro_batches():
    pair = Overlap(Action(Kind.FORWARD, 0, 1), Action(Kind.BACKWARD, 0, 0))
    assert peaks_of(((Action(Kind.FORWARD, 0, 0), pair),)).activations == (2,)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_removed_duplicated_or_renumbered_step_is_found(data):
    schedule = data.draw(st.sampled_from([ONE, DUAL, FOLDED, zb1p(3, 5), gpipe(2, 3)]))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    at = data.draw(st.integers(0, len(schedule.steps[rank]) - 1))
    how = data.draw(st.sampled_from(["remove", "repeat", "renumber"]))

    def edit(steps):
        if how == "remove":
            steps.pop(at)
        elif how == "repeat":
            steps.insert(at, steps[at])
        else:
            action = steps[at]
            if isinstance(action, Overlap):
                forward = replace(action.forward, micro_batch=action.forward.micro_batch + 1)
                steps[at] = Overlap(forward, action.backward)
            else:
                steps[at] = replace(action, micro_batch=action.micro_batch + 1)

    sentence(spoil(schedule, rank, edit))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_swapping_two_steps_of_one_direction_and_kind_is_found(data):
    schedule = data.draw(st.sampled_from([ONE, DUAL, FOLDED, zb1p(3, 5), gpipe(2, 3)]))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = schedule.steps[rank]
    groups = {}
    for at, step in enumerate(steps):
        if isinstance(step, Action) and step.kind is not Kind.WEIGHT_GRAD:
            groups.setdefault((step.kind, step.direction), []).append(at)
    pool = data.draw(st.sampled_from([group for group in groups.values() if len(group) > 1]))
    first, second = data.draw(st.permutations(pool))[:2]

    def edit(rows):
        rows[first], rows[second] = rows[second], rows[first]

    sentence(spoil(schedule, rank, edit))
