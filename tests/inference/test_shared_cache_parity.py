"""What is said with shared blocks and after preemption, against a roomy pool of unshared blocks.

The real stage in float64, where no choice hangs on the order of a sum.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import tiny_config, whole_model

from dualray.inference.limits import Limits
from dualray.inference.plan import Owner
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch

OWNER = Owner(0, 0, 0)
EOS = 3
ROOMY = Limits(
    num_blocks=64,
    block_size=4,
    max_batch=6,
    max_context=32,
    max_step_tokens=9,
    prefix_cache=False,
)
SHARED = replace(ROOMY, prefix_cache=True)
TIGHT = replace(ROOMY, num_blocks=10)
TIGHT_AND_SHARED = replace(TIGHT, prefix_cache=True)

STEM = (5, 17, 3, 60, 8, 9, 11, 2, 2)
PROMPTS = (STEM, STEM, (*STEM, 44), (1, 2, 3), (*STEM[:5], 7, 7), (90,), (4, 4, 8, 15, 16, 23))
# Each keeps something that preemption might lose: the random numbers' place, counts of tokens,
# how many tokens are still owed.
PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=16),
    "seeded": SamplingParams(temperature=1.5, max_tokens=16),
    "penalised": SamplingParams(
        temperature=0.7,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
        max_tokens=16,
    ),
    "owed": SamplingParams(min_tokens=9, max_tokens=16, logit_bias=((EOS, 20.0),)),
}
# Rows of a prompt run in other parts, which are summed in another order: rounding only.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def stage():
    return whole_model(tiny_config(), dtype=torch.float64)


def say(stage, limits: Limits, params: SamplingParams, prompts=PROMPTS):
    """(token, log-probability) pairs by request, and the scheduler at the end."""
    dispatch = LocalDispatch(stage.config.n_routed_experts)
    runner = StageRunner(
        stage, dispatch, num_blocks=limits.num_blocks, block_size=limits.block_size
    )
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=limits, eos_id=EOS)
    said = {}
    for seed, prompt in enumerate(prompts):
        said[str(seed)] = []
        scheduler.add(Request(request_id=str(seed), prompt_ids=prompt, params=params, seed=seed))
    while (plan := scheduler.plan()) is not None:
        for progress in scheduler.apply(runner.run(plan.sequences(OWNER), None).sampled):
            sampled = progress.sampled
            said[progress.request_id].append((sampled.token_id, sampled.logprob))
    scheduler.check_pool()
    assert scheduler.free_blocks() == {OWNER: limits.num_blocks}
    return said, scheduler.counts


def assert_same(said, expected):
    for name, pairs in expected.items():
        assert [token for token, _ in said[name]] == [token for token, _ in pairs], name
        got = torch.tensor([logprob for _, logprob in said[name]])
        wanted = torch.tensor([logprob for _, logprob in pairs])
        torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("limits", [SHARED, TIGHT, TIGHT_AND_SHARED])
def test_the_same_is_said(stage, limits, params):
    expected, plain = say(stage, ROOMY, params)
    assert (plain.num_preemptions, plain.prefix_queries) == (0, 0)
    assert len({tuple(pairs) for pairs in expected.values()}) > 3
    said, counts = say(stage, limits, params)
    assert_same(said, expected)
    assert (counts.num_preemptions > 0) == (limits.num_blocks < ROOMY.num_blocks)
    assert (counts.prefix_hits > 0) == limits.prefix_cache


def test_completions_of_one_prompt_run_it_once(stage):
    """All of them begin in the step that runs it."""
    prompts = (STEM * 2,) * 4
    params = PARAMS["seeded"]
    expected, _ = say(stage, ROOMY, params, prompts)
    said, counts = say(stage, replace(SHARED, max_step_tokens=32), params, prompts)
    assert_same(said, expected)
    # 16 of 18 tokens lie in full blocks.
    assert (counts.prefix_queries, counts.prefix_hits) == (4 * 18, 3 * 16)
