"""An engine that drafts says what one without says, and tells how its drafts fared.

Drafts that come true are put in place of the random modules', which hardly ever do.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.scrapes import scraping
from support.serving import serving

from dualray.inference.plan import Sampled
from dualray.inference.request import SamplingParams

PROMPTS = ("abc", "hello", "x", "zebra zebra")
ASKED = (
    {},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"min_tokens": 3, "stop_token_ids": tuple(range(60, 120))},
    {"logprobs": 2},
)


def complete(served, **common) -> list:
    """(token ids, text, finish reason, stop string) of completions that run together."""

    async def ask():
        completions = [
            served.engine.submit(
                prompt,
                SamplingParams(
                    **({"max_tokens": 24, "ignore_eos": True, "seed": i} | asked | common)
                ),
            )
            for i, (prompt, asked) in enumerate(zip(PROMPTS, ASKED))
        ]
        return [await completion.whole() for completion in completions]

    return [
        (tuple(t.token_id for t in d.tokens), d.text, d.finish, d.matched_stop)
        for d in served.call(ask())
    ]


def rightly(served, answers):
    """Makes the drafts what will be said, as many as were asked for."""
    said: dict[str, int] = {}

    def fault(plan, outcomes):
        changed = []
        for outcome in outcomes:
            assert isinstance(outcome, Sampled)
            said[outcome.request_id] = said.get(outcome.request_id, 0) + 1
            done = said[outcome.request_id]
            ids = answers[outcome.request_id][done:]
            changed.append(replace(outcome, draft_ids=ids[: len(outcome.draft_ids)]))
        return changed

    served.fault = fault


@pytest.mark.parametrize("stop", [(), ("stop",)])
def test_an_engine_that_drafts_says_the_same(stop):
    with serving() as plain:
        answers = complete(plain)
        steps = len(plain.plans)
        if stop:
            # Words that end completions inside a run of accepted drafts.
            stop = tuple(text[5:7] for _, text, _, _ in answers if len(text) > 8)
        expected = complete(plain, stop=stop)
    if stop:
        assert sum(matched is not None for _, _, _, matched in expected) >= 2
    with serving(draft_tokens=3) as served:
        assert complete(served, stop=stop) == expected
        served.call(_check_pool(served))
    with serving(draft_tokens=3) as served:
        rightly(served, {str(i): ids for i, (ids, *_) in enumerate(answers, start=1)})
        assert complete(served, stop=stop) == expected
        assert len(served.plans) < steps
        served.call(_check_pool(served))


async def _check_pool(served) -> None:
    served.engine.scheduler.check_pool()


def test_metrics_tell_what_was_drafted_and_accepted():
    with serving() as plain:
        answers = complete(plain)
    with serving(draft_tokens=3) as served, scraping(served) as scrape:
        rightly(served, {str(i): ids for i, (ids, *_) in enumerate(answers, start=1)})
        complete(served)
        answer = scrape()
        drafted, accepted = (
            answer(f"spec_decode_num_{name}_tokens_total") for name in ("draft", "accepted")
        )
        verified = [
            len(sequence.samples) - 1
            for plan in served.plans
            for sequences in plan.owners.values()
            for sequence in sequences
            if len(sequence.samples) > 1
        ]
        assert answer("spec_decode_num_drafts_total") == len(verified)
        assert drafted == sum(verified)
        assert accepted == drafted > 0
        by_place = [
            answer("spec_decode_num_accepted_tokens_per_pos_total", position=str(place))
            for place in range(max(verified))
        ]
        assert by_place == [sum(n > place for n in verified) for place in range(max(verified))]
