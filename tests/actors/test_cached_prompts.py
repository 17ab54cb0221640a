"""What callers and metrics learn of shared blocks and of preemption, and when blocks end."""

import asyncio
import math
from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.text_cache import TextCache

from dualray.actors.completion import Weights
from dualray.actors.engine import Engine
from dualray.data.tokenizer import ByteTokenizer
from dualray.inference.request import SamplingParams, ServerFaultError
from dualray.inference.scheduler import Limits, owners

LIMITS = Limits(num_blocks=32, block_size=4, max_batch=4, max_context=32)
PROMPT = tuple(range(10, 20))  # two full blocks and two tokens
PARAMS = SamplingParams(max_tokens=4)


def run(scenario, limits=LIMITS):
    """Runs `scenario(engine, model)` on a serving engine whose workers are a `TextCache`."""
    model = TextCache(limits.block_size)

    async def run_step(plan):
        return model.run(plan)

    async def whole():
        engine = Engine(
            model_name="m",
            tokenizer=ByteTokenizer(),
            owners=owners(1, 1, 1),
            limits=limits,
            max_request_s=60.0,
            run_step=run_step,
        )
        await engine.start()
        await engine.serve(Weights(training_step=1, digest="d"))
        result = await scenario(engine, model)
        engine.scheduler.check_pool()
        assert engine.scheduler.cache_usage == 0
        await engine.stop()
        return result

    return asyncio.run(whole())


def counted(engine: Engine) -> dict[str, float]:
    """vLLM's counters of the cache and of prompt tokens."""
    families = text_string_to_metric_families(generate_latest(engine.metrics.registry).decode())
    values = {s.name: s.value for family in families for s in family.samples}
    names = ("prompt_tokens", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits")
    return {name: values[f"vllm:{name}_total"] for name in names}


async def answer(engine: Engine, prompt=PROMPT, params=PARAMS):
    """The ended completion, and its token ids."""
    completion = engine.submit(prompt, params)
    whole = await completion.whole()
    return completion, [token.token_id for token in whole.tokens]


def test_a_completion_knows_how_much_of_its_prompt_was_cached():
    async def scenario(engine, model):
        first, _ = await answer(engine)
        again, said = await answer(engine)
        assert said == model.completion(PROMPT, again.request.seed, 4)
        return first.num_cached_tokens, again.num_cached_tokens, counted(engine)

    first, again, counts = run(scenario)
    assert (first, again) == (0, 8)
    assert counts == {
        "prompt_tokens": 20,
        "num_preemptions": 0,
        "prefix_cache_queries": 20,
        "prefix_cache_hits": 8,
    }


@pytest.mark.parametrize("given_owners", [None, owners(1, 1, 1)])
def test_other_weights_find_nothing_and_counters_go_on(given_owners):
    async def scenario(engine, model):
        await answer(engine)
        await engine.drain()
        await engine.serve(Weights(training_step=2, digest="e"), given_owners)
        later, _ = await answer(engine)
        return later.num_cached_tokens, counted(engine)

    cached, counts = run(scenario)
    assert cached == 0
    assert (counts["prefix_cache_queries"], counts["prefix_cache_hits"]) == (20, 0)


def test_rows_of_a_request_that_gave_nan_are_not_used_again():
    async def scenario(engine, model):
        sound, broken = model.run, []

        def broken_run(plan):
            broken.append(plan)
            return [replace(sampled, logprob=math.nan) for sampled in sound(plan)]

        model.run = broken_run
        with pytest.raises(ServerFaultError):
            await answer(engine)
        model.run = sound
        later, _ = await answer(engine)
        return later.num_cached_tokens, len(broken)

    assert run(scenario) == (0, 1)


def test_a_preempted_request_is_told_and_counted_once():
    limits = replace(LIMITS, num_blocks=8, prefix_cache=False)
    params = SamplingParams(max_tokens=20, seed=1)

    async def scenario(engine, model):
        both = await asyncio.gather(*(answer(engine, [token] * 8, params) for token in (1, 2)))
        for (_, said), token in zip(both, (1, 2)):
            assert said == model.completion([token] * 8, 1, 20)
        stats = engine.stats
        assert (stats.num_started, stats.prompt_tokens, stats.generation_tokens) == (2, 16, 40)
        return [completion.num_preemptions for completion, _ in both], counted(engine)

    preemptions, counts = run(scenario, limits)
    assert preemptions == [0, 1]
    assert counts == {
        "prompt_tokens": 16,
        "num_preemptions": 1,
        "prefix_cache_queries": 0,
        "prefix_cache_hits": 0,
    }
