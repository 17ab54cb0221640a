"""What the scheduler plans for drafts: rows, blocks and windows, under random traffic.

A stage in plain numbers stands for the workers: a token depends on the tokens before it, drafts are
right for a while, and the MTP modules' cache remembers who wrote which row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.inference.draft_length import DraftLengths
from dualray.inference.plan import Owner, Sampled, SequencePlan, StepPlan
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners
from dualray.inference.speculation import PROMPT_WINDOW, DraftCounts, Speculation

VOCAB, EOS, BLOCK = 20, 0, 4


def next_token(ids: Sequence[int]) -> int:
    return hashlib.blake2b(bytes(ids), digest_size=1).digest()[0] % VOCAB


@dataclass
class NumberStage:
    """Checks every plan as it runs it; `right` of its drafts in a row come true."""

    modules: int
    right: int
    tokens: dict[tuple[Owner, int, int], tuple[int, ...]] = field(default_factory=dict)
    """What each row of the main cache stands for: all tokens up to its own."""
    module_rows: dict[tuple[Owner, int, int], tuple[str, int]] = field(default_factory=dict)
    """By whom a row of the modules' cache was written, and for which position."""

    def run(self, plan: StepPlan) -> list[Sampled]:
        sampled: list[Sampled] = []
        for owner, sequences in plan.owners.items():
            for sequence in sequences:
                self._write(owner, sequence)
            for sequence in sequences:
                sampled += self._answer(owner, sequence)
        return sampled

    def _row(self, owner: Owner, plan: SequencePlan, position: int) -> tuple[Owner, int, int]:
        return owner, plan.block_table[position // BLOCK], position % BLOCK

    def _write(self, owner: Owner, plan: SequencePlan) -> None:
        for i, token in enumerate(plan.ids):
            position = plan.first_position + i
            before = self.tokens[self._row(owner, plan, position - 1)] if position else ()
            assert len(before) == position, "the row before is of another sequence"
            self.tokens[self._row(owner, plan, position)] = (*before, token)

    def _answer(self, owner: Owner, plan: SequencePlan) -> list[Sampled]:
        count = len(plan.ids) - len(plan.samples)
        said: list[Sampled] = []
        for row, spec in enumerate(plan.samples, start=count):
            ids = self.tokens[self._row(owner, plan, plan.first_position + row)]
            assert spec.position == len(ids)
            token = next_token(ids)
            said.append(Sampled(request_id=plan.request_id, token_id=token, logprob=-1.0, rank=1))
            if row + 1 < len(plan.ids) and plan.ids[row + 1] != token:
                break
        stands = plan.first_position + count + len(said)
        drafts = self._draft(owner, plan, stands, bool(said))
        if said:
            said[-1] = replace(said[-1], draft_ids=drafts)
        return said

    def _draft(
        self, owner: Owner, plan: SequencePlan, stands: int, chosen: bool
    ) -> tuple[int, ...]:
        """Rows of positions below `stands` stand."""
        asked = plan.drafting
        if asked is None:
            return ()
        assert asked.first_position % BLOCK == 0
        assert asked.num_passes >= max(asked.num_drafts, self.modules)
        assert chosen or asked.num_drafts == 0
        first = max(plan.first_position, asked.first_position)
        beyond = max(0, asked.num_drafts - self.modules)
        for position in range(first, stands + beyond):
            assert position // BLOCK < len(plan.block_table), "no block for a module's row"
            self.module_rows[self._row(owner, plan, position)] = (plan.request_id, position)
        for position in range(asked.first_position, stands + beyond):
            writer = self.module_rows.get(self._row(owner, plan, position))
            assert writer == (plan.request_id, position), "a module attends to nobody's row"
        if not chosen:
            return ()
        ids = list(self.tokens[self._row(owner, plan, stands - 1)])
        ids.append(next_token(ids))
        drafts = []
        for place in range(asked.num_drafts):
            token = next_token(ids)
            drafts.append(token if place < self.right else (token + 1) % VOCAB)
            ids.append(drafts[-1])
        return tuple(drafts)


def alone(prompt: Sequence[int], params: SamplingParams, max_context: int) -> list[int]:
    """The completion, one token after the other."""
    ids = list(prompt)
    while len(ids) < min(len(prompt) + params.max_tokens, max_context):
        ids.append(next_token(ids))
        if ids[-1] == EOS and not params.ignore_eos:
            break
    return ids[len(prompt) :]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "step", "step", "step", "cancel"]),
        st.integers(1, 14),
        st.integers(1, 14),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(
    EVENTS,
    st.integers(0, 4),
    st.integers(1, 2),
    st.integers(0, 4),
    st.integers(7, 14),
    st.integers(4, 12),
)
def test_drafts_of_any_quality_change_no_token(
    events, draft_tokens, modules, right, num_blocks, max_step_tokens
):
    limits = Limits(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_batch=4,
        max_context=28,
        max_step_tokens=max_step_tokens,
        draft_tokens=draft_tokens,
        draft_modules=min(modules, draft_tokens),
    )
    scheduler = Scheduler(owners=owners(1, 1, 2), limits=limits, eos_id=EOS)
    stage = NumberStage(modules=limits.draft_modules, right=right)
    asked: dict[str, Request] = {}
    said: dict[str, list[int]] = {}
    gone: set[str] = set()

    def step() -> bool:
        plan = scheduler.plan()
        if plan is None:
            return False
        for sequences in plan.owners.values():
            assert sum(len(s.ids) for s in sequences) <= max_step_tokens
        for progress in scheduler.apply(stage.run(plan)):
            said[progress.request_id].append(progress.sampled.token_id)
        scheduler.check_pool()
        return True

    for kind, first, second in events:
        if kind == "add":
            name = str(len(asked))
            prompt = tuple((first * 7 + i * i) % (VOCAB - 1) + 1 for i in range(first))
            params = SamplingParams(max_tokens=second, ignore_eos=bool(second % 2))
            asked[name] = Request(request_id=name, prompt_ids=prompt, params=params, seed=1)
            said[name] = []
            scheduler.add(asked[name])
        elif kind == "cancel" and asked:
            gone.add(name := str(first % len(asked)))
            scheduler.remove(name)
        else:
            step()
    while step():
        pass
    for name, request in asked.items():
        expected = alone(request.prompt_ids, request.params, limits.max_context)
        assert said[name] == (expected[: len(said[name])] if name in gone else expected)
    drafts = scheduler.counts.drafts
    assert drafts.num_accepted_tokens == sum(drafts.accepted_per_pos)
    if not right:
        assert drafts.num_accepted_tokens == 0


def steps_for(draft_tokens: int, right: int, max_tokens: int = 24) -> int:
    limits = Limits(
        num_blocks=16,
        block_size=BLOCK,
        max_batch=1,
        max_context=64,
        draft_tokens=draft_tokens,
        draft_modules=min(1, draft_tokens),
    )
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=limits, eos_id=None)
    params = SamplingParams(max_tokens=max_tokens)
    scheduler.add(Request(request_id="a", prompt_ids=(1, 2, 3), params=params, seed=1))
    stage = NumberStage(modules=limits.draft_modules, right=right)
    steps = 0
    while (plan := scheduler.plan()) is not None:
        scheduler.apply(stage.run(plan))
        steps += 1
    return steps


def test_right_drafts_save_as_many_steps_as_they_can():
    assert steps_for(0, 0) == 24
    # One token of the prompt's step, then two or four a step.
    assert steps_for(1, 1) == 1 + 12
    assert steps_for(3, 3) == 1 + 6


@pytest.mark.parametrize("num_blocks", [7, 30])
def test_blocks_that_others_have_filled_hold_no_module_rows_of_ones_own(num_blocks):
    """Equal prompts that come together run once: behind what was found the modules begin anew."""
    limits = Limits(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_batch=3,
        max_context=28,
        max_step_tokens=4,
        draft_tokens=2,
        draft_modules=1,
    )
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=limits, eos_id=None)
    stage = NumberStage(modules=1, right=2)
    prompt, params = tuple(range(1, 14)), SamplingParams(max_tokens=8, ignore_eos=True)
    for name in "abc":
        scheduler.add(Request(request_id=name, prompt_ids=prompt, params=params, seed=1))
    said: dict[str, list[int]] = {name: [] for name in "abc"}
    while (plan := scheduler.plan()) is not None:
        for progress in scheduler.apply(stage.run(plan)):
            said[progress.request_id].append(progress.sampled.token_id)
    assert list(said.values()) == [alone(prompt, params, 28)] * 3
    assert scheduler.counts.prefix_hits > 0


def asking(speculation: Speculation, start: int, stop: int, **changes):
    values = {
        "length": stop,
        "num_to_come": 50,
        "most": 9,
        "num_modules": 1,
        "next_ids": (),
        "block_size": 16,
    }
    return speculation.ask(range(start, stop), **(values | changes))


def test_a_window_goes_on_until_it_is_interrupted():
    speculation = Speculation(lengths=DraftLengths(2))
    assert asking(speculation, 0, 40).first_position == 0
    assert asking(speculation, 40, 41).first_position == 0
    speculation.interrupt()
    assert asking(speculation, 41, 42) is None  # the next block begins at 48
    assert asking(speculation, 47, 48) is None
    assert asking(speculation, 48, 49).first_position == 48
    # Nothing is drafted for the last tokens, and what comes after that begins anew.
    assert asking(speculation, 49, 50, num_to_come=2) is None
    assert asking(speculation, 50, 51) is None
    assert asking(speculation, 64, 65).first_position == 64


def test_long_prompts_go_through_the_modules_at_their_end_only():
    speculation = Speculation(lengths=DraftLengths(2))
    assert asking(speculation, 0, 512, length=1000) is None
    assert PROMPT_WINDOW == 64
    part = asking(speculation, 512, 990, length=1000, next_ids=(7,))
    # 64 tokens, and up to a block more.
    assert 1000 - PROMPT_WINDOW - 16 < part.first_position <= 1000 - PROMPT_WINDOW
    assert (part.num_drafts, part.num_passes, part.next_ids) == (0, 1, (7,))
    end = asking(speculation, 990, 1000, length=1000)
    assert end.first_position == part.first_position
    assert end.num_drafts == end.num_passes > 0


def test_counts_are_by_step_and_by_place():
    counts = DraftCounts()
    for num_drafts, num_accepted in ((3, 3), (3, 0), (2, 1)):
        counts.add(num_drafts, num_accepted)
    assert counts == DraftCounts(
        num_drafts=3, num_draft_tokens=8, num_accepted_tokens=4, accepted_per_pos=[2, 1, 1]
    )
