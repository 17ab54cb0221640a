"""The completions of one request with `n` above 1, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from dualray.actors.completion import Completion, Delta


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
