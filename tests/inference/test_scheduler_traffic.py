"""The inference scheduler under random traffic with too few blocks.

What requests say is checked against a twin without any cache (`support.text_cache`): shared,
stolen or stale blocks would show as wrong tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.text_cache import TextCache

from dualray.inference.limits import Limits
from dualray.inference.plan import StepPlan
from dualray.inference.request import FinishReason, QueueFullError, Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners

STEMS = (
    (1, 2, 3, 4, 5, 0, 0, 1, 2, 3, 4, 5, 5),
    (1, 2, 3, 4, 1, 2, 3, 4, 1),
    (0, 0, 0, 0, 1, 2, 3, 4, 1),
    (4, 4, 4),
)
"""Prompts begin alike, and the same block comes behind different ones."""


@dataclass
class Alive:
    request: Request
    length: int
    said: list[int] = field(default_factory=list)


class Traffic(RuleBasedStateMachine):
    """Adds, steps, cancels and lets deadlines pass; everybody else says what the twin says."""

    @initialize(
        num_blocks=st.integers(6, 12),
        max_batch=st.integers(2, 4),
        max_step_tokens=st.integers(4, 9),
        num_owners=st.integers(1, 2),
        prefix_cache=st.booleans(),
    )
    def start(self, num_blocks, max_batch, max_step_tokens, num_owners, prefix_cache):
        self.limits = Limits(
            num_blocks=num_blocks,
            block_size=4,
            max_batch=max_batch,
            max_context=24,
            max_step_tokens=max_step_tokens,
            max_waiting=8,
            prefix_cache=prefix_cache,
        )
        self.scheduler = Scheduler(owners=owners(1, 1, num_owners), limits=self.limits, eos_id=None)
        self.cache = TextCache(self.limits.block_size)
        self.alive: dict[str, Alive] = {}
        self.num_added = 0
        self.now = 0

    @rule(
        stem=st.sampled_from(STEMS),
        more=st.lists(st.integers(0, 1), max_size=5),
        copies=st.integers(1, 3),
        max_tokens=st.integers(1, 14),
        seed=st.integers(0, 2),
        patience=st.sampled_from((None, None, 3)),
        scored=st.booleans(),
    )
    def add(self, stem, more, copies, max_tokens, seed, patience, scored):
        prompt = (*stem, *more)
        length = min(max_tokens, self.limits.max_context - len(prompt))
        for copy in range(copies):
            name = str(self.num_added)
            self.num_added += 1
            request = Request(
                request_id=name,
                prompt_ids=prompt,
                params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=0 if scored else None),
                seed=seed + copy,
                deadline=None if patience is None else self.now + patience,
            )
            full = self.scheduler.num_waiting >= self.limits.max_waiting
            try:
                self.scheduler.add(request)
                assert not full
                self.alive[name] = Alive(request, length)
            except QueueFullError:
                assert full

    @rule()
    def step(self):
        self.run_step()

    @rule(count=st.integers(2, 6))
    def run_on(self, count):
        for _ in range(count):
            self.run_step()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), in_flight=st.booleans(), spoiled=st.booleans())
    def cancel(self, data, in_flight, spoiled):
        """Between steps, or while one runs."""
        name = data.draw(st.sampled_from(sorted(self.alive)))
        plan = self.scheduler.plan() if in_flight else None
        assert self.scheduler.remove(name, spoiled=spoiled)
        del self.alive[name]
        if plan is not None:
            self.finish_step(plan)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds):
        self.now += seconds
        late = {
            name
            for name, alive in self.alive.items()
            if alive.request.deadline is not None and alive.request.deadline <= self.now
        }
        assert set(self.scheduler.expire(self.now)) == late
        for name in late:
            del self.alive[name]

    def run_step(self):
        batches = self.scheduler._batches.items()
        oldest = {
            owner: batch._sequences[0].request.request_id
            for owner, batch in batches
            if batch._sequences
        }
        plan = self.scheduler.plan()
        assert (plan is None) == (not self.alive), "somebody waits and nothing runs"
        if plan is not None:
            for owner, name in oldest.items():
                names = [s.request_id for s in plan.sequences(owner)]
                assert name in names, "an owner's oldest request stands still"
            self.finish_step(plan)

    def finish_step(self, plan: StepPlan):
        self.check_plan(plan)
        self.scheduler.check_pool()
        for progress in self.scheduler.apply(self.cache.run(plan)):
            alive = self.alive[progress.request_id]
            alive.said.append(progress.sampled.token_id)
            prompt = alive.request.prompt_ids
            assert progress.num_cached_tokens < len(prompt)
            if alive.request.params.prompt_logprobs is not None:
                assert progress.num_cached_tokens == 0
            assert (progress.finish is None) == (len(alive.said) < alive.length)
            if progress.finish is not None:
                assert progress.finish is FinishReason.LENGTH
                twin = self.cache.completion(prompt, alive.request.seed, alive.length)
                assert alive.said == twin, "blocks were mixed up"
                del self.alive[progress.request_id]

    def check_plan(self, plan: StepPlan):
        for owner, batch in self.scheduler._batches.items():
            sequences = plan.sequences(owner)
            assert len(sequences) <= self.limits.max_batch
            assert len({s.request_id for s in sequences}) == len(sequences)
            num_tokens = sum(len(s.ids) for s in sequences)
            assert num_tokens <= self.limits.max_step_tokens
            assert all(s.ids for s in sequences)
            if num_tokens < self.limits.max_step_tokens:
                assert len(sequences) >= len(batch._sequences), "one stands still for no reason"

    @invariant()
    def nothing_is_lost(self):
        scheduler = self.scheduler
        scheduler.check_pool()
        assert scheduler.num_running + scheduler.num_waiting == len(self.alive)
        assert scheduler.counts.prefix_hits <= scheduler.counts.prefix_queries
        arrivals = [s.arrival for s in scheduler._waiting]
        assert arrivals == sorted(arrivals), "somebody was overtaken in the queue"
        never_ran = [s.arrival for s in scheduler._waiting if not s.num_preemptions]
        running = [s.arrival for s in scheduler._running.values()]
        assert not never_ran or max(running, default=-1) < never_ran[0]

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # Even one after the other, each in single tokens and begun anew by every other one.
        for _ in range(20 * (len(self.alive) + 1) ** 2):
            self.run_step()
            if not self.alive:
                break
        assert not self.alive, "requests starve"
        assert self.scheduler.plan() is None
        self.scheduler.check_pool()
        assert set(self.scheduler.free_blocks().values()) == {self.limits.num_blocks}


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
