"""The inference scheduler against hand-made steps."""

import pickle

import pytest

from dualray.inference.plan import Adjustment, Owner, Sampled, StepPlan
from dualray.inference.request import FinishReason, QueueFullError, Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners

ONE = (Owner(0, 0, 0),)
EOS = 0


def make(owner_list=ONE, **limits) -> Scheduler:
    values = {"num_blocks": 8, "block_size": 4, "max_batch": 4, "max_context": 16}
    return Scheduler(owners=owner_list, limits=Limits(**(values | limits)), eos_id=EOS)


def request(name: str, prompt=(5, 6, 7), deadline=None, **params) -> Request:
    return Request(
        request_id=name,
        prompt_ids=tuple(prompt),
        params=SamplingParams(**params),
        seed=1,
        deadline=deadline,
    )


def answer(plan: StepPlan, token: int = 9) -> list[Sampled]:
    return [
        Sampled(request_id=s.request_id, token_id=token, logprob=-1.0, rank=1)
        for sequences in plan.owners.values()
        for s in sequences
        if s.samples
    ]


def adjustment(plan: StepPlan) -> Adjustment | None:
    return plan.owners[ONE[0]][0].samples[-1].adjust


def ids_by_request(plan: StepPlan) -> dict[str, tuple[int, ...]]:
    return {s.request_id: s.ids for sequences in plan.owners.values() for s in sequences}


def test_requests_that_arrive_together_run_in_one_step():
    scheduler = make()
    scheduler.add(request("a", (1, 2)))
    scheduler.add(request("b", (3,)))
    plan = scheduler.plan()
    assert ids_by_request(plan) == {"a": (1, 2), "b": (3,)}
    scheduler.apply(answer(plan, token=8))
    assert ids_by_request(scheduler.plan()) == {"a": (8,), "b": (8,)}


def test_a_late_request_joins_the_next_step_beside_running_ones():
    scheduler = make()
    scheduler.add(request("a"))
    scheduler.apply(answer(scheduler.plan()))
    scheduler.add(request("b", (1, 2)))
    plan = scheduler.plan()
    assert ids_by_request(plan) == {"a": (9,), "b": (1, 2)}
    (first, second) = plan.owners[ONE[0]]
    assert (first.first_position, second.first_position) == (3, 0)
    assert set(first.block_table).isdisjoint(second.block_table)


def test_a_request_keeps_its_owner_and_new_ones_go_to_the_least_loaded():
    scheduler = make(owners(1, 2, 2))
    for name in "abcd":
        scheduler.add(request(name, max_tokens=5))
    plan = scheduler.plan()
    placed = {o: [s.request_id for s in q] for o, q in plan.owners.items()}
    assert sorted(placed.values()) == [["a"], ["b"], ["c"], ["d"]]
    scheduler.apply(answer(plan))
    again = {o: [s.request_id for s in q] for o, q in scheduler.plan().owners.items()}
    assert again == placed
    assert plan.directions(0) == (0, 1)
    assert plan.directions(1) == ()


def test_it_ends_at_max_tokens_and_frees_its_blocks():
    scheduler = make()
    scheduler.add(request("a", max_tokens=2))
    first = scheduler.apply(answer(scheduler.plan()))
    assert first[0].finish is None
    assert scheduler.free_blocks()[ONE[0]] < 8
    last = scheduler.apply(answer(scheduler.plan()))
    assert last[0].finish is FinishReason.LENGTH
    assert scheduler.free_blocks()[ONE[0]] == 8
    assert scheduler.plan() is None


def test_it_ends_where_the_context_ends():
    scheduler = make(max_context=5)
    scheduler.add(request("a", (1, 2, 3), max_tokens=100))
    scheduler.apply(answer(scheduler.plan()))
    assert scheduler.apply(answer(scheduler.plan()))[0].finish is FinishReason.LENGTH


@pytest.mark.parametrize("params", [{}, {"stop_token_ids": (9,)}])
def test_it_ends_at_a_stop_token(params):
    scheduler = make()
    scheduler.add(request("a", **params))
    token = 9 if params else EOS
    (progress,) = scheduler.apply(answer(scheduler.plan(), token=token))
    assert progress.finish is FinishReason.STOP
    assert progress.stop_token


def test_ignore_eos_goes_on():
    scheduler = make()
    scheduler.add(request("a", ignore_eos=True))
    assert scheduler.apply(answer(scheduler.plan(), token=EOS))[0].finish is None


def test_stop_tokens_are_banned_until_min_tokens():
    scheduler = make()
    scheduler.add(request("a", min_tokens=1, stop_token_ids=(4,)))
    plan = scheduler.plan()
    assert set(adjustment(plan).banned_ids) == {EOS, 4}
    scheduler.apply(answer(plan))
    assert adjustment(scheduler.plan()) is None


def test_repetition_sees_the_prompt_and_the_others_the_completion_only():
    scheduler = make()
    scheduler.add(request("a", (5, 6, 5), repetition_penalty=1.5, frequency_penalty=0.5))
    plan = scheduler.plan()
    assert (adjustment(plan).seen_ids, adjustment(plan).output_counts) == ((5, 6), ())
    for token in (6, 9, 6):
        scheduler.apply(answer(plan, token))
        plan = scheduler.plan()
    assert adjustment(plan) == Adjustment(
        repetition_penalty=1.5,
        seen_ids=(5, 6, 9),
        frequency_penalty=0.5,
        output_counts=((6, 2), (9, 1)),
    )


def test_histories_are_not_shared():
    scheduler = make()
    scheduler.add(request("a", (1,), presence_penalty=1.0))
    scheduler.add(request("b", (2,), presence_penalty=1.0))
    scheduler.plan()
    scheduler.apply(
        Sampled(request_id=name, token_id=token, logprob=-1.0, rank=1)
        for name, token in (("a", 7), ("b", 8))
    )
    first, second = scheduler.plan().owners[ONE[0]]
    assert first.samples[-1].adjust.output_counts == ((7, 1),)
    assert second.samples[-1].adjust.output_counts == ((8, 1),)


def test_a_name_that_comes_again_begins_anew():
    scheduler = make()
    scheduler.add(request("a", presence_penalty=1.0))
    plan = scheduler.plan()
    scheduler.apply(answer(plan))
    scheduler.remove("a")
    scheduler.add(request("a", presence_penalty=1.0))
    assert adjustment(scheduler.plan()) is None


@pytest.mark.parametrize(
    "neutral",
    [
        {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0},
        {"logit_bias": ((5, 0.0),)},
    ],
)
def test_neutral_values_send_nothing(neutral):
    sizes = []
    for params in ({}, neutral):
        scheduler = make()
        scheduler.add(request("a", **params))
        scheduler.apply(answer(scheduler.plan()))
        plan = scheduler.plan()
        assert adjustment(plan) is None
        sizes.append(len(pickle.dumps(plan)))
    assert sizes[0] == sizes[1]


def test_cancelling_frees_blocks_at_once_and_drops_what_is_in_flight():
    scheduler = make()
    scheduler.add(request("a"))
    plan = scheduler.plan()
    assert scheduler.remove("a")
    assert scheduler.free_blocks()[ONE[0]] == 8
    assert scheduler.apply(answer(plan)) == []
    assert not scheduler.remove("a")


def test_cancelling_a_waiting_request_takes_it_from_the_queue():
    scheduler = make(max_batch=1)
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    scheduler.plan()
    assert scheduler.num_waiting == 1
    assert scheduler.remove("b")
    assert scheduler.num_waiting == 0


def test_a_deadline_removes_running_and_waiting_requests():
    scheduler = make(max_batch=1)
    scheduler.add(request("a", deadline=10.0))
    scheduler.add(request("b", deadline=11.0))
    scheduler.plan()
    assert scheduler.expire(9.9) == []
    assert set(scheduler.expire(11.0)) == {"a", "b"}
    assert scheduler.free_blocks()[ONE[0]] == 8
    assert scheduler.plan() is None


def test_requests_wait_for_blocks_in_order():
    # Each needs 4 of 9 blocks; the third waits although a short one behind it would fit.
    scheduler = make(num_blocks=9)
    for token, name in enumerate("abc"):
        scheduler.add(request(name, [token] * 13))
    scheduler.add(request("d", (1,), max_tokens=1))
    plan = scheduler.plan()
    assert set(ids_by_request(plan)) == {"a", "b"}
    scheduler.remove("a")
    assert set(ids_by_request(scheduler.plan())) == {"c", "d"}


def test_the_queue_has_a_limit():
    scheduler = make(max_waiting=1)
    scheduler.add(request("a"))
    with pytest.raises(QueueFullError) as raised:
        scheduler.add(request("b"))
    assert str(raised.value) == ("1 requests wait and serve.max_waiting is 1; try again later.")


def test_a_long_prompt_runs_in_parts_and_does_not_stall_running_ones():
    scheduler = make(max_step_tokens=4, max_batch=2)
    scheduler.add(request("a", (1, 2)))
    scheduler.apply(answer(scheduler.plan()))
    scheduler.add(request("b", range(1, 8)))
    plan = scheduler.plan()
    assert ids_by_request(plan) == {"a": (9,), "b": (1, 2, 3)}
    assert plan.owners[ONE[0]][1].samples == ()
    scheduler.apply(answer(plan))
    plan = scheduler.plan()
    assert ids_by_request(plan) == {"a": (9,), "b": (4, 5, 6)}
    scheduler.apply(answer(plan))
    plan = scheduler.plan()
    assert ids_by_request(plan)["b"] == (7,)
    assert plan.owners[ONE[0]][1].samples[-1].position == 7
