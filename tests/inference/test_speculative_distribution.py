"""Completions drawn with drafts have the model's own distribution.

It is enough to say so of each token, but a completion's tokens could still hang together through
the noise; so pairs are counted, against the product of the model's probabilities.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import tiny_config, training_context, whole_model

from dualray.inference.plan import Owner
from dualray.inference.request import Request, SamplingParams
from dualray.inference.scheduler import Limits, Scheduler, owners
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch

VOCAB = 7
STAGE = whole_model(
    tiny_config(vocab_size=VOCAB, num_nextn_predict_layers=1, initializer_range=0.4)
)
PROMPT = (3, 1, 6, 2)
COUNT = 3000
LIMITS = Limits(num_blocks=64 * 3, block_size=4, max_batch=64, max_context=12)
LAST = 3
"""Of a completion's tokens the pair (1, 2) is counted: both may come from accepted drafts."""


def drawn(draft_tokens: int, temperature: float) -> tuple[list[tuple[int, ...]], float]:
    """Completions of COUNT seeds, and the share of drafts that came true."""
    limits = replace(LIMITS, draft_tokens=draft_tokens, draft_modules=min(1, draft_tokens))
    scheduler = Scheduler(owners=owners(1, 1, 1), limits=limits, eos_id=None)
    runner = StageRunner(
        STAGE,
        LocalDispatch(STAGE.config.n_routed_experts),
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        draft_modules=limits.draft_modules,
    )
    params = SamplingParams(max_tokens=LAST + 2, temperature=temperature)
    waiting = [
        Request(request_id=str(seed), prompt_ids=PROMPT, params=params, seed=seed)
        for seed in range(COUNT)
    ]
    said: dict[str, list[int]] = {request.request_id: [] for request in waiting}
    while waiting or scheduler.num_running:
        while waiting and scheduler.num_waiting + scheduler.num_running < limits.max_batch:
            scheduler.add(waiting.pop())
        plan = scheduler.plan()
        assert plan is not None
        sequences = plan.sequences(Owner(0, 0, 0))
        outcomes = runner.run(sequences, None, draft_passes=plan.draft_passes(0, 0)).sampled
        for progress in scheduler.apply(outcomes):
            said[progress.request_id].append(progress.sampled.token_id)
    drafts = scheduler.counts.drafts
    share = drafts.num_accepted_tokens / max(1, drafts.num_draft_tokens)
    return [tuple(tokens) for tokens in said.values()], share


def exact(temperature: float) -> torch.Tensor:
    """Probability (V, V) of the completion's second and third token, by the training forward."""
    total = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)

    def probabilities(ids: tuple[int, ...]) -> torch.Tensor:
        ctx = training_context(STAGE.config, (len(ids),))
        with torch.no_grad():
            hidden = STAGE(STAGE.embed(torch.tensor(ids), ctx), ctx)
            logits = STAGE.logits(hidden[-1:], ctx)[0]
        return torch.softmax(logits.double() / temperature, -1)

    first = probabilities(PROMPT)
    for a in range(VOCAB):
        second = probabilities((*PROMPT, a))
        for b in range(VOCAB):
            total[b] += first[a] * second[b] * probabilities((*PROMPT, a, b))
    return total


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_pairs_of_tokens_are_drawn_as_often_as_the_model_says(temperature):
    plain, _ = drawn(0, temperature)
    drafted, share = drawn(2, temperature)
    assert 0.1 < share < 0.9, "drafts must come true, and must fail"
    assert drafted == plain
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for tokens in drafted:
        counts[tokens[1], tokens[2]] += 1
    expected = exact(temperature) * COUNT
    # Cells that are hardly ever hit make no chi-square: they go together.
    rare = expected < 5
    cells = torch.cat((counts[~rare], counts[rare].sum()[None]))
    wanted = torch.cat((expected[~rare], expected[rare].sum()[None]))
    assert len(cells) > 15
    statistic = ((cells - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    # 99.9 % of chi-square with k degrees of freedom lie below k + 3.1 sqrt(2 k) + 6; the seeds are
    # fixed, so this holds always or never.
    k = len(cells) - 1
    assert statistic < k + 3.1 * (2 * k) ** 0.5 + 6
    # The same counts are not those of another temperature.
    other = exact(temperature * 1.25) * COUNT
    assert (
        (cells - torch.cat((other[~rare], other[rare].sum()[None]))) ** 2 / wanted
    ).sum() > 2 * k
