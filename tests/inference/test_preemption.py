"""What happens when an owner's blocks run out."""

from dataclasses import replace

from support.text_cache import TextCache

from dualray.inference.limits import Limits
from dualray.inference.plan import Owner
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners

OWNER = Owner(0, 0, 0)
LIMITS = Limits(
    num_blocks=6,
    block_size=4,
    max_batch=4,
    max_context=24,
    max_step_tokens=32,
    prefix_cache=False,
)


def make(num_owners: int = 1, **limits) -> Scheduler:
    limits = replace(LIMITS, **limits)
    return Scheduler(owners=owners(1, 1, num_owners), limits=limits, eos_id=None)


def add(scheduler: Scheduler, name: str, prompt, max_tokens: int, **params) -> None:
    params = SamplingParams(max_tokens=max_tokens, **params)
    scheduler.add(Request(request_id=name, prompt_ids=tuple(prompt), params=params, seed=1))


def steps(scheduler: Scheduler, model: TextCache, said: dict[str, list[int]]):
    """Runs to the end; yields the tokens of each request that a step ran."""
    while (plan := scheduler.plan()) is not None:
        for progress in scheduler.apply(model.run(plan)):
            said.setdefault(progress.request_id, []).append(progress.sampled.token_id)
        scheduler.check_pool()
        yield {s.request_id: s.ids for planned in plan.owners.values() for s in planned}


def test_blocks_are_taken_as_a_sequence_grows():
    scheduler, model = make(), TextCache(4)
    add(scheduler, "a", (1, 2, 3), 9)
    taken = [6 - scheduler.free_blocks()[OWNER] for _ in steps(scheduler, model, {})]
    # 3 tokens, then one more a step: the last chosen token never runs.
    assert taken == [1, 1, 2, 2, 2, 2, 3, 3, 0]


def test_the_youngest_makes_way_and_says_in_the_end_what_it_would_have_said():
    scheduler, model, said = make(), TextCache(4), {}
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        add(scheduler, name, [token] * 4, 12)
    ran = list(steps(scheduler, model, said))
    assert set(ran[0]) == {"a", "b", "c"}
    # Each holds two blocks after 4 tokens more, and all need a third at once: both younger go.
    assert scheduler.counts.num_preemptions == 2
    assert [set(names) for names in ran[1:6]] == [{"a", "b", "c"}] * 4 + [{"a", "b"}]
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        assert said[name] == model.completion([token] * 4, 1, 12)
    # It runs again from its first token, with what it has said so far, in one step.
    again = next(ids["c"] for ids in ran[5:] if "c" in ids)
    assert again == (3, 3, 3, 3, *said["c"][:5])


def test_no_more_are_preempted_than_must_be():
    """One block is short in all, and one sequence gives up two."""
    scheduler, model, said = make(num_blocks=7), TextCache(4), {}
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        add(scheduler, name, [token] * 4, 9)
    list(steps(scheduler, model, said))
    assert scheduler.counts.num_preemptions == 1


def test_it_comes_back_before_those_that_came_later():
    scheduler, model, said = make(max_batch=2), TextCache(4), {}
    add(scheduler, "a", [1] * 8, 16)
    add(scheduler, "b", [2] * 8, 10)
    add(scheduler, "c", [3], 1)
    first = {}
    for at, ids in enumerate(steps(scheduler, model, said)):
        for name in ids:
            first.setdefault(name, []).append(at)
    assert scheduler.counts.num_preemptions == 1
    gap = next(i for i, (x, y) in enumerate(zip(first["b"], first["b"][1:])) if y > x + 1)
    assert first["c"][0] >= first["b"][gap + 1]


def test_preempted_ones_wait_in_the_order_of_their_arrival():
    scheduler, model = make(num_blocks=8, max_batch=4), TextCache(4)
    for name in ("a", "b", "c", "d"):
        add(scheduler, name, [int(name, 16)] * 4, 20)
    admitted: list[str] = []
    for ids in steps(scheduler, model, {}):
        admitted += [name for name in ids if len(ids[name]) > 1]
    assert admitted[:4] == ["a", "b", "c", "d"]
    assert admitted[4:] == sorted(admitted[4:])


def test_nobody_is_admitted_only_to_be_preempted_in_the_next_step():
    """Four blocks of six are taken, a fifth is about to be, and the newcomer would need two."""
    scheduler, model = make(), TextCache(4)
    add(scheduler, "a", [1] * 8, 16)
    add(scheduler, "b", [2] * 8, 2)
    running = steps(scheduler, model, {})
    next(running)
    add(scheduler, "c", [3] * 4, 8)
    assert set(next(running)) == {"a", "b"}
    assert set(next(running)) == {"a", "c"}  # b has ended
    assert scheduler.counts.num_preemptions == 0


def test_the_longest_request_runs_in_the_smallest_pool():
    scheduler, model, said = make(), TextCache(4), {}
    add(scheduler, "short", [2], 20)
    add(scheduler, "long", [1] * 23, 9)
    list(steps(scheduler, model, said))
    assert said["long"] == model.completion([1] * 23, 1, 1)


def test_many_in_the_smallest_pool_all_end():
    scheduler, model, said = make(max_batch=4, max_step_tokens=4), TextCache(4), {}
    for number in range(12):
        add(scheduler, str(number), [number] * (1 + number), 24)
    for at, _ in enumerate(steps(scheduler, model, said)):
        assert at < 2000, "they take each other's blocks for ever"
    for number in range(12):
        prompt = [number] * (1 + number)
        assert said[str(number)] == model.completion(prompt, 1, 23 - number)


def test_a_preempted_one_may_go_to_another_owner():
    scheduler, model, said = make(num_owners=2), TextCache(4), {}
    for name, token in (("a", 1), ("x", 9), ("b", 2)):
        add(scheduler, name, [token] * 8, 2 if name == "x" else 16)
    places: dict[str, set[Owner]] = {}
    while (plan := scheduler.plan()) is not None:
        for owner, planned in plan.owners.items():
            for sequence in planned:
                places.setdefault(sequence.request_id, set()).add(owner)
        for progress in scheduler.apply(model.run(plan)):
            said.setdefault(progress.request_id, []).append(progress.sampled.token_id)
    assert scheduler.counts.num_preemptions == 1
    assert len(places["b"]) == 2
    assert said["b"] == model.completion([2] * 8, 1, 16)


def test_what_it_has_said_counts_for_stop_tokens_and_penalties():
    scheduler = make(num_blocks=6)
    add(scheduler, "a", [1] * 8, 16)
    add(scheduler, "b", [2] * 8, 8, min_tokens=7, stop_token_ids=(99,), frequency_penalty=1.0)
    model, told = TextCache(4), []
    while (plan := scheduler.plan()) is not None:
        for sequence in plan.sequences(OWNER):
            if sequence.request_id == "b" and sequence.samples:
                adjust = sequence.samples[-1].adjust
                told.append((adjust.banned_ids, sum(n for _, n in adjust.output_counts)))
        scheduler.apply(model.run(plan))
    assert scheduler.counts.num_preemptions == 1
    assert told == [((99,) if n < 7 else (), n) for n in range(8)]


def test_blocks_that_nobody_took_meanwhile_are_found_again():
    scheduler, model, said = make(prefix_cache=True, num_blocks=7), TextCache(4), {}
    add(scheduler, "a", [1] * 8, 16)
    add(scheduler, "b", [2] * 8, 9)
    ran = list(steps(scheduler, model, said))
    assert scheduler.counts.num_preemptions == 1
    again = [ids["b"] for ids in ran if len(ids.get("b", ())) > 1][1]
    assert 1 < len(again) < 8 + len(said["b"])
    assert said["b"] == model.completion([2] * 8, 1, 9)
    # What it finds of its own is no other request's saving.
    assert (scheduler.counts.prefix_queries, scheduler.counts.prefix_hits) == (16, 0)


def test_what_it_runs_again_is_found_by_others_again():
    scheduler, model, said = make(prefix_cache=True), TextCache(4), {}
    add(scheduler, "a", [1] * 8, 16)  # which needs all blocks in the end
    add(scheduler, "b", [2] * 8, 9)
    ran = [ids["b"] for ids in steps(scheduler, model, said) if "b" in ids]
    assert max(map(len, ran)) > 8
    hits = scheduler.counts.prefix_hits
    add(scheduler, "c", [2] * 8 + said["b"], 1)
    list(steps(scheduler, model, said))
    assert scheduler.counts.prefix_hits == hits + 16


def test_nobody_stands_still_while_a_step_has_tokens_left():
    """A prompt that could fill the last blocks leaves one to the prompts behind it."""
    scheduler = make(num_blocks=34, max_batch=6, max_step_tokens=10, max_context=56)
    model = TextCache(4)
    for name, num_prompt in (("a", 6), ("p", 32), ("q", 42), ("b", 2), ("r", 50), ("s", 39)):
        add(scheduler, name, [ord(name)] * num_prompt, 56 - num_prompt if name in "ab" else 2)
    fewest = 34
    while (plan := scheduler.plan()) is not None:
        planned = plan.sequences(OWNER)
        if sum(len(s.ids) for s in planned) < 10:
            assert len(planned) == scheduler.num_running
        fewest = min(fewest, *scheduler.free_blocks().values())
        scheduler.apply(model.run(plan))
    assert fewest == 0


def test_its_end_while_it_waits_leaves_nothing_behind():
    scheduler, model = make(), TextCache(4)
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        add(scheduler, name, [token] * 4, 12)
    for _ in steps(scheduler, model, {}):
        if scheduler.num_waiting:
            assert scheduler.remove("c")
            break
    for ids in steps(scheduler, model, {}):
        assert "c" not in ids
    assert scheduler.free_blocks() == {OWNER: 6}
