"""Prompt log-probabilities of serving against `score`, part by part and over the pipeline."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import tiny_config, whole_model
from support.stages import Mailbox, split_stages

from dualray.inference.plan import Owner, PromptScored, PromptSpec, SequencePlan
from dualray.inference.prompt_scores import score_prompts
from dualray.inference.prompt_spec import prompt_spec
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners
from dualray.inference.scoring import run_pack, score
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.moe import LocalDispatch

# Five tokens a step cut the prompts at odd places, with single tokens of others beside them.
LIMITS = Limits(num_blocks=32, block_size=4, max_batch=4, max_context=32, max_step_tokens=5)
PROMPTS = {
    "a": ((5, 17, 3, 60, 8, 9, 11, 2, 44), 3),
    "b": ((1, 2, 3), None),
    "c": ((90,), 2),
    "d": ((4, 4, 8, 15, 16, 23, 42), 0),
    "e": ((31, 7), 20),
}
CONFIG = tiny_config(num_nextn_predict_layers=0)


def runner(stage) -> StageRunner:
    dispatch = LocalDispatch(CONFIG.n_routed_experts)
    return StageRunner(stage, dispatch, num_blocks=LIMITS.num_blocks, block_size=LIMITS.block_size)


def in_one_process(stage):
    return StepRunner(replica=0, expert=0, stages={0: runner(stage)}).run


def over_two_stages(stage):
    mail = Mailbox()
    first, last = (
        StepRunner(replica=0, expert=0, stages={0: runner(part)}, transport=mail)
        for part in split_stages(CONFIG, 2)
    )

    def run(plan):
        assert first.run(plan) == []
        return last.run(plan)

    return run


def request(name: str, prompt, num_top) -> Request:
    params = SamplingParams(max_tokens=4, prompt_logprobs=num_top)
    return Request(request_id=name, prompt_ids=prompt, params=params, seed=1)


def served(run_plan) -> tuple[dict[str, list], int]:
    """Scored prompt tokens by request, and into how many parts they came."""
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=LIMITS, eos_id=None)
    for name, (prompt, num_top) in PROMPTS.items():
        scheduler.add(request(name, prompt, num_top))
    told: dict[str, list] = {}
    num_parts = 0
    while (plan := scheduler.plan()) is not None:
        outcomes = run_plan(plan)
        for part in outcomes:
            if isinstance(part, PromptScored):
                tokens = told.setdefault(part.request_id, [])
                assert part.first_position == len(tokens) + 1
                tokens += part.tokens
                num_parts += 1
        scheduler.apply([o for o in outcomes if not isinstance(o, PromptScored)])
    return told, num_parts


@pytest.mark.parametrize("make", [in_one_process, over_two_stages])
def test_every_prompt_token_is_told_of_as_score_scores_it(make):
    stage = whole_model(CONFIG)
    told, num_parts = served(make(stage))
    assert set(told) == {"a", "d", "e"}  # "b" asks for nothing, "c" has nothing to tell
    assert num_parts > len(told)
    for name, tokens in told.items():
        prompt, num_top = PROMPTS[name]
        assert [t.token_id for t in tokens] == list(prompt[1:])
        # The absorbed attention of serving sums in another order: rounding only.
        assert [t.logprob for t in tokens] == pytest.approx(score(stage, [prompt])[0], abs=1e-5)
        assert all(len(t.top) == num_top for t in tokens)


def test_ranks_and_alternatives_are_those_of_all_logits():
    stage = whole_model(CONFIG)
    told, _ = served(in_one_process(stage))
    for name, tokens in told.items():
        prompt, num_top = PROMPTS[name]
        _, normed, ctx = run_pack(stage, [prompt])
        chances = stage.head(normed, ctx).double().log_softmax(-1)[:-1]
        for row, token in zip(chances, tokens):
            order = row.argsort(descending=True).tolist()
            assert token.rank == order.index(token.token_id) + 1
            assert [i for i, _ in token.top] == order[:num_top]
            for i, value in token.top:
                assert value == pytest.approx(row[i].item(), abs=1e-5)


def test_logits_of_a_few_rows_at_a_time_give_the_same():
    stage = whole_model(CONFIG)
    ids = torch.randint(CONFIG.vocab_size, (11,)).tolist()
    plan = SequencePlan(
        request_id="a",
        ids=tuple(ids[:10]),
        first_position=0,
        block_table=(0, 1, 2),
        samples=(),
        prompt=PromptSpec(targets=tuple(ids[1:]), logprobs=2),
    )
    with torch.no_grad():
        normed = stage.norm(runner(stage).run([plan], None).hidden_TD)
        (whole,) = score_prompts(stage.head, normed, [plan], rows_at_once=100)
        (parts,) = score_prompts(stage.head, normed, [plan], rows_at_once=3)
    assert [t.token_id for t in parts.tokens] == ids[1:]
    for one, other in zip(whole.tokens, parts.tokens):
        # A product of three rows may round otherwise than one of ten.
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert one.top[0][0] == other.top[0][0]


def test_bf16_is_scored_in_fp32():
    stage = whole_model(CONFIG, dtype=torch.bfloat16)
    told, _ = served(in_one_process(stage))
    values = [t.logprob for tokens in told.values() for t in tokens]
    assert torch.tensor(values).bfloat16().float().tolist() != values


def test_what_is_behind_the_prompt_is_not_scored():
    asked = request("a", (3, 1, 4, 1, 5), 2)
    assert prompt_spec(asked, 0, 2) == PromptSpec(targets=(1, 4), logprobs=2)
    assert prompt_spec(asked, 2, 3) == PromptSpec(targets=(1, 5), logprobs=2)
    assert prompt_spec(asked, 4, 1) is None
    # A preempted request runs its completion's tokens again.
    assert prompt_spec(asked, 3, 5) == PromptSpec(targets=(5,), logprobs=2)
    assert prompt_spec(asked, 5, 3) is None
    plain = dataclasses.replace(asked, params=SamplingParams())
    assert prompt_spec(plain, 0, 5) is None


def test_one_of_n_completions_scores_the_prompt():
    each = SamplingParams(n=3, prompt_logprobs=2).each()
    assert [p.prompt_logprobs for p in each] == [2, None, None]


def test_the_plan_names_the_rows_to_score():
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=LIMITS, eos_id=None)
    scheduler.add(request("a", (3, 1, 4, 1, 5, 9, 2), 1))
    specs = []
    for _ in range(2):
        plan = scheduler.plan()
        assert plan is not None
        specs.append(plan.sequences(Owner(0, 0, 0))[0].prompt)
    assert [s.targets for s in specs] == [(1, 4, 1, 5, 9), (2,)]
