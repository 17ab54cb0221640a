"""Blocks of the same beginning: who finds them, when, and what is counted."""

from dataclasses import replace

import pytest
from support.text_cache import TextCache

from dualray.inference.limits import Limits
from dualray.inference.plan import Owner
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners

OWNER = Owner(0, 0, 0)
LIMITS = Limits(num_blocks=16, block_size=4, max_batch=4, max_context=32, max_step_tokens=64)
PROMPT = tuple(range(10, 20))  # two full blocks and two tokens


class Case:
    """A scheduler, and the model that reads its cache."""

    def __init__(self, num_owners: int = 1, **limits) -> None:
        limits = replace(LIMITS, **limits)
        self.scheduler = Scheduler(owners=owners(1, 1, num_owners), limits=limits, eos_id=None)
        self.model = TextCache(limits.block_size)
        self.cached: dict[str, int] = {}
        self.said: dict[str, list[int]] = {}

    def add(self, name: str, prompt=PROMPT, **params) -> None:
        params = SamplingParams(**{"max_tokens": 4} | params)
        self.scheduler.add(
            Request(request_id=name, prompt_ids=tuple(prompt), params=params, seed=1)
        )

    def step(self) -> dict[str, int]:
        """Runs a step; how many tokens of each request it ran."""
        plan = self.scheduler.plan()
        for progress in self.scheduler.apply(self.model.run(plan)):
            self.cached[progress.request_id] = progress.num_cached_tokens
            self.said.setdefault(progress.request_id, []).append(progress.sampled.token_id)
        self.scheduler.check_pool()
        return {s.request_id: len(s.ids) for planned in plan.owners.values() for s in planned}

    def end(self) -> None:
        while self.scheduler.num_running + self.scheduler.num_waiting:
            self.step()

    def answer(self, name: str, prompt=PROMPT, **params) -> int:
        """Runs one request to its end; returns how many tokens it found."""
        self.add(name, prompt, **params)
        self.end()
        return self.cached[name]


def test_a_prompt_that_comes_again_runs_behind_its_last_full_block():
    case = Case()
    assert case.answer("first") == 0
    case.add("again")
    assert case.step() == {"again": 2}
    case.end()
    assert case.cached["again"] == 8
    assert case.said["again"] == case.said["first"] == case.model.completion(PROMPT, 1, 4)


def test_one_token_always_runs():
    """Without a row there is nothing to choose the next token from."""
    case = Case()
    case.answer("first", PROMPT[:8])
    case.add("again", PROMPT[:8])
    assert case.step() == {"again": 4}
    assert case.cached["again"] == 4


def test_what_was_said_is_found_as_well_as_what_was_asked():
    """The next turn of a conversation begins with the last one."""
    case = Case()
    case.answer("first", max_tokens=8)
    turn = (*PROMPT, *case.said["first"], 5, 5)
    # Rows of 10 + 8 tokens but the last, which never ran: 17, of which 16 are in full blocks.
    assert case.answer("second", turn) == 16
    assert case.said["second"] == case.model.completion(turn, 1, 4)


def test_the_same_block_behind_another_one_is_another_block():
    case = Case()
    case.answer("first", (1, 1, 1, 1, 2, 2, 2, 2, 3))
    assert case.answer("second", (2, 2, 2, 2, 2, 2, 2, 2, 3)) == 0
    assert case.answer("third", (1, 1, 1, 1, 2, 2, 2, 2, 4)) == 8


def test_prompts_that_come_together_run_once_and_read_what_that_step_writes():
    case = Case()
    for name in ("a", "b", "c"):
        case.add(name)
    assert case.step() == {"a": 10, "b": 2, "c": 2}
    case.end()
    assert case.cached == {"a": 0, "b": 8, "c": 8}
    assert case.said["c"] == case.model.completion(PROMPT, 1, 4)


def test_prompts_that_run_in_parts_help_each_other_on():
    """Each runs what nobody has run yet; none runs all of it."""
    case = Case(max_step_tokens=8, num_blocks=32)
    prompt = tuple(range(28))
    for name in ("a", "b"):
        case.add(name, prompt, max_tokens=1)
    num_run = {"a": 0, "b": 0}
    while case.scheduler.num_running + case.scheduler.num_waiting:
        for name, count in case.step().items():
            num_run[name] += count
    assert sum(num_run.values()) <= 28 + 4  # both must run the last block
    assert case.said["a"] == case.said["b"] == case.model.completion(prompt, 1, 1)


def test_a_request_in_its_course_shares_and_its_end_takes_nothing_away():
    case = Case()
    case.add("a", max_tokens=2)
    case.step()
    case.add("b", max_tokens=9)
    assert case.step() == {"a": 1, "b": 2}
    case.end()
    assert case.said["b"] == case.model.completion(PROMPT, 1, 9)


def test_blocks_that_nobody_uses_count_as_free_and_are_given_up_for_others():
    case = Case(num_blocks=8)
    case.answer("first")
    assert (case.scheduler.cache_usage, case.scheduler.free_blocks()) == (0, {OWNER: 8})
    case.answer("large", range(20, 48), max_tokens=4)
    assert case.answer("again") == 0
    assert case.said["again"] == case.said["first"]


def test_the_longest_unused_is_given_up_first_and_of_it_the_end():
    case = Case(num_blocks=9, max_context=16)
    first, second = range(10, 23), range(30, 43)  # three full blocks each, and a token
    case.answer("first", first, max_tokens=1)
    case.answer("second", second, max_tokens=1)
    case.answer("first again", first, max_tokens=1)
    # Of four blocks three were never known; the other one is the last of "second".
    case.answer("third", range(50, 65), max_tokens=1)
    assert case.answer("first once more", first, max_tokens=1) == 12
    assert case.answer("second again", second, max_tokens=1) == 8


def test_who_wants_its_prompt_scored_runs_all_of_it_and_others_reuse_it():
    case = Case()
    case.answer("first")
    case.add("scored", prompt_logprobs=0)
    assert case.step() == {"scored": 10}
    case.end()
    assert case.scheduler.counts.prefix_queries == 10  # vLLM looks nothing up for it either
    assert case.answer("again") == 8


def test_a_cancelled_prompt_leaves_what_it_has_run():
    case = Case(max_step_tokens=8)
    case.add("a", range(20))
    assert case.step() == {"a": 8}
    case.scheduler.remove("a")
    assert case.answer("b", range(20)) == 8
    assert case.said["b"] == case.model.completion(range(20), 1, 4)


def test_what_a_spoiled_request_has_run_is_run_again():
    case = Case()
    case.add("a")
    case.step()
    case.scheduler.remove("a", spoiled=True)
    assert case.answer("b") == 0


def test_another_scheduler_knows_nothing():
    case = Case()
    case.answer("first")
    other = Case()
    assert other.answer("again") == 0


def test_it_can_be_turned_off():
    case = Case(prefix_cache=False)
    assert case.answer("first") == case.answer("again") == 0
    assert case.scheduler.counts.prefix_queries == 0


def test_tokens_are_counted_once_for_each_request():
    case = Case()
    for name in ("a", "b", "c"):
        case.add(name)
    case.end()
    counts = case.scheduler.counts
    assert (counts.prefix_queries, counts.prefix_hits) == (30, 16)


def test_the_owner_that_has_run_the_beginning_takes_it_unless_too_busy():
    case = Case(num_owners=2, max_batch=8, num_blocks=64)
    case.answer("first")
    for name in "abcd":
        case.add(name, (*PROMPT, 1))
    plan = case.scheduler.plan()
    # A quarter of max_batch more than the other one, and no more.
    assert [len(planned) for planned in plan.owners.values()] == [3, 1]


@pytest.mark.parametrize("num_owners", [1, 2])
def test_owners_share_nothing(num_owners):
    """Their caches are different tensors."""
    case = Case(num_owners=num_owners, max_batch=1)
    case.add("a", max_tokens=1)
    case.add("b", max_tokens=1)
    case.step()
    case.end()
    assert case.cached["b"] == (8 if num_owners == 1 else 0)
