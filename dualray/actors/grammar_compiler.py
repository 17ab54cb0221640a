"""Grammars for the engine: compiled on threads of their own, so that no step waits for one."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.data.tokenizer import Tokenizer
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.grammars import Grammars
from dualray.inference.request import MAX_N, QueueFullError, SamplingParams

NUM_THREADS = 2
MAX_WAITING = MAX_N
"""Completions whose grammars may wait. One takes a millisecond, a hostile one half a second."""


class GrammarCompiler:
    """Compiles `structured_outputs`. Use from one event loop only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = byte_level_json() if tokenizer.kind == "bytes" else tokenizer.content
        self._grammars = Grammars(content, tokenizer.eos_id)
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._num_waiting = 0

    async def compile(self, params: SamplingParams) -> list[GrammarMatcher | None]:
        """A matcher for each of the n completions; None for each where nothing is asked for.

        Raises:
            RequestError: the grammar cannot be used.
            QueueFullError: too many wait for theirs.
        """
        what = params.structured_outputs
        if what is None:
            return [None] * params.n
        if self._num_waiting + params.n > MAX_WAITING:
            raise QueueFullError(
                f"{self._num_waiting} grammars are being compiled and {params.n} more would exceed "
                f"{MAX_WAITING}",
                hint="try again later",
            )
        loop = asyncio.get_running_loop()
        self._num_waiting += params.n

        def start() -> asyncio.Future[GrammarMatcher]:
            return loop.run_in_executor(self._threads, self._grammars.compile, what)

        try:
            first = await start()  # if it cannot be used, nobody tries the others
            return [first, *await asyncio.gather(*[start() for _ in range(params.n - 1)])]
        finally:
            self._num_waiting -= params.n

    def close(self) -> None:
        """Ends the threads; what has begun ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)
