"""Requests served with drafts and without: the same tokens, in fewer steps.

The real scheduler and stage, in this process. Drafts come from the model's MTP modules (random
ones: what they propose is nearly always wrong), from the completion itself (always right), or
from a mix of both (right up to some place).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from support.models import tiny_config, whole_model

from dualray.inference.plan import Owner, Sampled
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Progress, Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch

EOS = 0
VALUES = {"num_blocks": 60, "block_size": 4, "max_batch": 5, "max_context": 48}
PROMPTS = (
    (5, 17, 3, 60, 8, 9, 11, 2, 41, 42, 43, 44, 45),
    (1, 2, 3),
    (90,),
    (5, 17, 3, 60, 8, 9, 11, 2, 7),
    (31, 7),
)
STAGE = whole_model(tiny_config(), dtype=torch.float64)
"""Float64: a tie must not fall another way because more rows share a product."""

Propose = Callable[[str, int], Sequence[int]]
"""Drafts behind the first so many tokens of a request's completion."""


def serve(
    requests: Iterable[Request],
    *,
    draft_tokens: int = 0,
    propose: Propose | None = None,
    eos_id: int | None = EOS,
    **limits,
) -> tuple[dict[str, list[Progress]], Scheduler, int]:
    """What every request said, and how many steps it took."""
    drafting = {"draft_tokens": draft_tokens, "draft_modules": min(2, draft_tokens)}
    values = Limits(**(VALUES | drafting | limits))
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=values, eos_id=eos_id)
    runner = StageRunner(
        STAGE,
        LocalDispatch(STAGE.config.n_routed_experts),
        num_blocks=values.num_blocks,
        block_size=values.block_size,
        draft_modules=values.draft_modules,
    )
    said: dict[str, list[Progress]] = {}
    for request in requests:
        said[request.request_id] = []
        scheduler.add(request)
    steps = 0
    while (plan := scheduler.plan()) is not None:
        steps += 1
        sequences = plan.sequences(Owner(0, 0, 0))
        assert sum(len(s.ids) for s in sequences) <= values.max_step_tokens
        sampled = runner.run(sequences, None, draft_passes=plan.draft_passes(0, 0)).sampled
        if propose is not None:
            sampled = _with_drafts(sampled, said, propose)
        for progress in scheduler.apply(sampled):
            said[progress.request_id].append(progress)
        scheduler.took(plan, 0.001)
        scheduler.check_pool()
    return said, scheduler, steps


def _with_drafts(
    sampled: list[Sampled], said: dict[str, list[Progress]], propose: Propose
) -> list[Sampled]:
    """Other drafts in place of the modules', as many or fewer."""
    counts = {name: len(tokens) for name, tokens in said.items()}
    changed = []
    for token in sampled:
        counts[token.request_id] += 1
        drafts = propose(token.request_id, counts[token.request_id])
        changed.append(replace(token, draft_ids=tuple(drafts)[: len(token.draft_ids)]))
    return changed


def tokens(said: dict[str, list[Progress]]) -> dict[str, list[tuple]]:
    """All that can be told of a completion from outside."""
    return {
        name: [(p.sampled.token_id, p.finish, p.stop_token) for p in progress]
        for name, progress in said.items()
    }


def requests(**params) -> list[Request]:
    values = {"max_tokens": 20, "temperature": 0.0} | params
    return [
        Request(request_id=str(i), prompt_ids=prompt, params=SamplingParams(**values), seed=100 + i)
        for i, prompt in enumerate(PROMPTS)
    ]


ASKED = {
    "greedy": {},
    "drawn": {"temperature": 1.0},
    "cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalised": {
        "temperature": 0.9,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.7,
        "presence_penalty": 0.3,
        "logit_bias": ((9, 2.0), (11, -3.0)),
    },
    "penalised greedily": {"repetition_penalty": 1.3, "frequency_penalty": 1.1},
    "ended by tokens": {"temperature": 1.0, "stop_token_ids": tuple(range(3, 20)), "min_tokens": 4},
    "told of": {"temperature": 1.0, "logprobs": 3, "prompt_logprobs": 2},
    "short": {"max_tokens": 2},
    "one": {"max_tokens": 1},
    "to the end of the context": {"max_tokens": 100},
}


@pytest.mark.parametrize("name", ASKED)
def test_drafts_change_nothing_but_the_number_of_steps(name):
    asked = requests(**ASKED[name])
    plain, _, steps = serve(asked)
    expected = tokens(plain)

    def right(request: str, done: int) -> list[int]:
        return [token for token, _, _ in expected[request][done:]]

    def right_for_two(request: str, done: int) -> list[int]:
        drafts = right(request, done)
        return [token if i < 2 else (token + 1) % 97 for i, token in enumerate(drafts)]

    for draft_tokens in (1, 3):
        for propose in (None, right, right_for_two):
            said, scheduler, taken = serve(asked, draft_tokens=draft_tokens, propose=propose)
            assert tokens(said) == expected
            for mine, theirs in zip(said.values(), plain.values()):
                for one, other in zip(mine, theirs):
                    # Absorbed attention over other shapes: rounding only.
                    assert one.sampled.logprob == pytest.approx(other.sampled.logprob, abs=1e-9)
                    assert [i for i, _ in one.sampled.top] == [i for i, _ in other.sampled.top]
            drafts = scheduler.counts.drafts
            assert taken <= steps
            if propose is right and name not in ("short", "one"):
                assert taken < steps
                assert drafts.num_accepted_tokens == drafts.num_draft_tokens > 0
