"""The n completions of one call: asked for together, read as one stream, ended together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from dualray.actors.completion import Completion, Delta
from dualray.actors.engine import Engine
from dualray.actors.prompt_ids import prompt_ids_of
from dualray.errors import RequestError
from dualray.inference.call_limits import check_call
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.request import SamplingParams


def submit_all(
    engine: Engine,
    prompt: str | Sequence[int],
    params: SamplingParams,
    timeout_s: float | None = None,
    *,
    every_token: bool = False,
    grammars: Sequence[GrammarMatcher | None] | None = None,
) -> list[Completion]:
    """All n completions of a call, or none. Raises what `Engine.submit` raises.

    `grammars` are what `Engine.grammars` has compiled of the parameters, one for each completion.
    A deadline of gRPC's is not asked for here: at its end both sides cancel, whoever is alive.
    """
    check_call(params, engine.limits.max_context, engine.limits.max_waiting)
    if params.n > 1:  # read once, not n times
        prompt = prompt_ids_of(prompt, engine.tokenizer, engine.limits.max_context, params)
    completions: list[Completion] = []
    try:
        for one, grammar in zip(params.each(), grammars or [None] * params.n):
            completion = engine.submit(
                prompt, one, timeout_s, every_token=every_token, grammar=grammar
            )
            completions.append(completion)
    except RequestError:
        cancel_all(completions)
        raise
    return completions


def cancel_all(completions: Sequence[Completion]) -> None:
    """Frees what they still hold; those that have ended are left alone."""
    for completion in completions:
        completion.cancel()


async def merged(completions: Sequence[Completion]) -> AsyncGenerator[tuple[int, Delta]]:
    """(which completion, its delta) as they come, until every completion has ended.

    Raises what iterating a completion raises, as soon as one does. Close it when leaving early.
    """
    if len(completions) == 1:
        async for delta in completions[0]:
            yield 0, delta
        return
    news: asyncio.Queue[tuple[int, Delta] | Exception] = asyncio.Queue()

    async def pump(index: int, completion: Completion) -> None:
        try:
            async for delta in completion:
                news.put_nowait((index, delta))
        except Exception as error:  # raised again where the stream is read
            news.put_nowait(error)

    pumps = [asyncio.create_task(pump(i, c)) for i, c in enumerate(completions)]
    try:
        num_left = len(completions)
        while num_left:
            item = await news.get()
            if isinstance(item, Exception):
                raise item
            num_left -= item[1].finish is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
