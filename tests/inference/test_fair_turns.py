"""Who is admitted where, and how prompts share what decoding leaves of a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualray.inference.limits import Limits
from dualray.inference.owner_choice import Candidate, choose_owner
from dualray.inference.plan import Owner, Sampled
from dualray.inference.prompt_turns import prompt_turns
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners

A, B, C = owners(1, 1, 3)


def choose(max_lead: int = 2, **candidates) -> Owner | None:
    """`a=(load, reusable)` for owner A, and so on."""
    by_owner = {
        owner: Candidate(load=candidates[name][0], num_reusable=candidates[name][1])
        for name, owner in zip("abc", (A, B, C))
        if name in candidates
    }
    return choose_owner(by_owner, max_lead)


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ({}, None),
        ({"a": (3, 0), "b": (1, 0), "c": (1, 0)}, B),
        ({"a": (3, 16), "b": (1, 0)}, A),
        ({"a": (4, 16), "b": (1, 0)}, B),  # three more than the least loaded
        ({"a": (3, 16), "b": (2, 32), "c": (1, 48)}, C),
        ({"a": (3, 16), "b": (2, 16)}, B),
        ({"a": (9, 99), "b": (3, 8), "c": (3, 16)}, C),
    ],
)
def test_the_owner_with_the_longest_beginning_unless_too_busy(candidates, chosen):
    assert choose(**candidates) == chosen


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3),
    st.integers(0, 4),
)
def test_nobody_leads_by_more_than_allowed(pairs, max_lead):
    chosen = choose(max_lead, **dict(zip("abc", pairs)))
    load, reusable = pairs[(A, B, C).index(chosen)]
    assert load <= min(pairs)[0] + max_lead
    for other_load, other_reusable in pairs:
        if other_load <= load:
            assert other_reusable <= reusable


@pytest.mark.parametrize(
    ("lengths", "budget", "turns"),
    [
        ([], 8, []),
        ([30], 8, [(0, 8)]),
        ([30, 3], 8, [(0, 5), (1, 8)]),  # the short one leaves 5
        ([30, 9, 4], 8, [(0, 4), (2, 8), (1, 8)]),
        ([30, 9, 9], 9, [(0, 5), (1, 9), (2, 9)]),
        ([2, 30], 8, [(0, 4), (1, 8)]),
        ([30, 30], 1, [(0, 1), (1, 1)]),
    ],
)
def test_half_is_the_oldest_ones_and_half_the_shortest_ones(lengths, budget, turns):
    assert prompt_turns(lengths, budget) == turns


@given(st.lists(st.integers(2, 50), min_size=1, max_size=6), st.integers(1, 60))
def test_the_oldest_always_gets_on_and_nothing_is_left_over(lengths, budget):
    left = budget
    for index, most in prompt_turns(lengths, budget):
        count = min(lengths[index], most, left)
        if index == 0:
            assert count >= min(lengths[0], budget / 2)
        left -= count
    assert left == max(0, budget - sum(lengths))


def run(scheduler: Scheduler) -> dict[str, int]:
    """A step; how many tokens of each request it ran."""
    plan = scheduler.plan()
    planned = [s for sequences in plan.owners.values() for s in sequences]
    scheduler.apply(
        Sampled(request_id=s.request_id, token_id=9, logprob=-1.0, rank=1)
        for s in planned
        if s.samples
    )
    return {s.request_id: len(s.ids) for s in planned}


def make(**limits) -> Scheduler:
    values = {"num_blocks": 64, "block_size": 4, "max_batch": 4, "max_context": 64}
    limits = Limits(**(values | {"max_step_tokens": 8} | limits))
    return Scheduler(owners=owners(1, 1, 1), limits=limits, eos_id=None)


def add(scheduler: Scheduler, name: str, num_tokens: int, max_tokens: int = 9) -> None:
    prompt = tuple(ord(name) + i for i in range(num_tokens))
    params = SamplingParams(max_tokens=max_tokens)
    scheduler.add(Request(request_id=name, prompt_ids=prompt, params=params, seed=1))


def test_a_short_prompt_is_answered_while_a_long_one_before_it_still_runs():
    scheduler = make()
    add(scheduler, "L", 60)
    assert run(scheduler) == {"L": 8}
    add(scheduler, "s", 6)
    assert run(scheduler) == {"L": 4, "s": 4}
    assert run(scheduler) == {"L": 6, "s": 2}
    assert run(scheduler) == {"L": 7, "s": 1}


def test_a_long_prompt_ends_while_short_ones_never_cease():
    scheduler = make()
    add(scheduler, "L", 40, max_tokens=1)
    for number in range(11):
        add(scheduler, chr(ord("a") + number), 6, max_tokens=1)
        if "L" in (ran := run(scheduler)):
            assert ran["L"] >= 4
    assert number == 10
    assert "L" not in ran  # 40 tokens at 4 a step or more


def test_decoding_is_held_up_by_no_prompt():
    scheduler = make()
    for name in "abc":
        add(scheduler, name, 1, max_tokens=30)
    run(scheduler)
    add(scheduler, "L", 40)
    for _ in range(6):
        assert run(scheduler) == {"a": 1, "b": 1, "c": 1, "L": 5}


def test_a_large_request_is_not_overtaken_in_the_queue():
    """What it needs is not given to those behind it, though that leaves blocks idle."""
    scheduler = make(num_blocks=16)
    add(scheduler, "a", 20, max_tokens=3)
    add(scheduler, "L", 60, max_tokens=1)
    add(scheduler, "s", 1, max_tokens=1)
    order = []
    while scheduler.num_running + scheduler.num_waiting:
        order += [name for name in run(scheduler) if name not in order]
    assert order == ["a", "L", "s"]
