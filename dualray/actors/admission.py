"""From a call to its completions, whose grammar may have to be compiled first.

What needs no grammar is checked before, and the time of a request runs from here: a compiler
that others keep busy gives nobody more of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from dualray.actors.completion import Completion
from dualray.actors.engine import Engine
from dualray.actors.merged_completions import submit_all
from dualray.actors.new_request import checked_prompt
from dualray.inference.call_limits import check_call
from dualray.inference.request import DeadlineError, SamplingParams


async def admit(
    engine: Engine,
    prompt: str | Sequence[int],
    params: SamplingParams,
    timeout_s: float | None = None,
    *,
    every_token: bool = False,
    aborted: asyncio.Event | None = None,
) -> list[Completion]:
    """All n completions of a call, or none, as `submit_all`.

    Those of a call that is aborted while its grammar is compiled have no grammar. They come at
    once, for the caller to abort.

    Raises:
        RequestError: prompt or parameters break a rule, or the grammar cannot be used.
        DeadlineError: the time ran out while the grammar was compiled.
        NotServingError, NoWeightsError, QueueFullError: not now.
    """
    if params.structured_outputs is None:
        return submit_all(engine, prompt, params, timeout_s, every_token=every_token)
    clock = asyncio.get_running_loop().time
    time_left = engine.max_request_s if timeout_s is None else min(engine.max_request_s, timeout_s)
    deadline = clock() + time_left
    engine.states.need_serving(engine.model_name)
    check_call(params, engine.limits.max_context, engine.limits.max_waiting)
    ids = checked_prompt(
        prompt, params, tokenizer=engine.tokenizer, max_context=engine.limits.max_context
    )
    compiling = asyncio.create_task(engine.grammars.compile(params))
    aborting = asyncio.create_task((aborted or asyncio.Event()).wait())
    try:
        await asyncio.wait(
            (compiling, aborting), timeout=time_left, return_when=asyncio.FIRST_COMPLETED
        )
        if aborting.done():
            params, grammars = replace(params, structured_outputs=None), None
        elif compiling.done():
            grammars = compiling.result()
        else:
            raise DeadlineError(
                "the request's time ran out before its grammar was compiled",
                hint="allow more time or make the grammar simpler",
            )
    finally:
        compiling.cancel()
        aborting.cancel()
        await asyncio.gather(compiling, aborting, return_exceptions=True)
    return submit_all(
        engine, ids, params, deadline - clock(), every_token=every_token, grammars=grammars
    )
