"""Grammars for the engine: compiled on threads of their own, so that no step waits for one, and
only after a process that may die of them has survived them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.data.tokenizer import Tokenizer
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.grammar_trial import STACK_BYTES, encode
from dualray.inference.grammars import Grammars, refusal
from dualray.inference.request import MAX_N, QueueFullError, SamplingParams
from dualray.inference.structured_outputs import StructuredOutputs
from dualray.inference.trial_process import TrialProcess

NUM_THREADS = 2
MAX_WAITING = MAX_N
"""Completions whose grammars may wait. One takes a millisecond, a hostile one a second."""
MAX_HELD_BYTES = 1 << 30
"""Memory of all completions' matchers together, as their trials have measured it."""
MAX_KNOWN = 1024
"""Grammars that need no other trial, the last ones that were used."""

T = TypeVar("T")


class GrammarCompiler:
    """Compiles `structured_outputs`. Use from one event loop only."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        content = byte_level_json() if tokenizer.kind == "bytes" else tokenizer.content
        self._grammars = Grammars(content, tokenizer.eos_id)
        self._trial = TrialProcess(content, tokenizer.eos_id)
        self._trials = ThreadPoolExecutor(1, thread_name_prefix="grammar-trial")
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self._num_waiting = 0
        self._tasks: set[asyncio.Task[list[GrammarMatcher | None]]] = set()
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        """By a grammar's digest, bytes of a matcher."""
        self._held: WeakKeyDictionary[GrammarMatcher, int] = WeakKeyDictionary()
        self._compiling_bytes = 0

    async def compile(self, params: SamplingParams) -> list[GrammarMatcher | None]:
        """A matcher for each of the n completions; None for each where nothing is asked for.

        When cancelled it returns at once, but its places in the queue are taken until the threads
        are done with what they have begun.

        Raises:
            RequestError: the grammar cannot be used.
            QueueFullError: too many wait for theirs, or hold too much memory.
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
        given_up = threading.Event()
        task = asyncio.create_task(self._compile(what, params.n, given_up))
        self._num_waiting += params.n
        self._tasks.add(task)

        def done(task: asyncio.Task[list[GrammarMatcher | None]]) -> None:
            self._num_waiting -= params.n
            self._tasks.discard(task)
            if not task.cancelled():
                task.exception()  # nobody may be left to hear of it

        task.add_done_callback(done)
        try:
            return await asyncio.shield(task)
        finally:
            given_up.set()

    async def close(self) -> None:
        """Ends threads and process; what has begun is waited for, and nothing else begins."""
        self._trials.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._trial.close)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compile(
        self, what: StructuredOutputs, count: int, given_up: threading.Event
    ) -> list[GrammarMatcher | None]:
        size_bytes = await self._size_bytes(what, given_up)
        with self._room_for(count * size_bytes, what):
            jobs = [
                _start(self._threads, lambda: self._grammars.compile(what), given_up)
                for _ in range(count)
            ]
            # All of them, so that none is at work when this has ended.
            found = await asyncio.gather(*jobs, return_exceptions=True)
            for matcher in found:
                if isinstance(matcher, BaseException):
                    raise matcher
                if matcher is not None:
                    self._held[matcher] = size_bytes
            return [m for m in found if not isinstance(m, BaseException)]

    async def _size_bytes(self, what: StructuredOutputs, given_up: threading.Event) -> int:
        """Of a matcher; from a trial, if that is not known."""
        digest = hashlib.sha256(encode(what)).digest()
        if digest not in self._sizes:
            size = await _start(self._trials, lambda: self._trial.size_bytes(what), given_up)
            if size is None:  # given up before it began
                return 0
            self._sizes[digest] = size
            if len(self._sizes) > MAX_KNOWN:
                self._sizes.popitem(last=False)
        self._sizes.move_to_end(digest)
        return self._sizes[digest]

    @contextlib.contextmanager
    def _room_for(self, size_bytes: int, what: StructuredOutputs) -> Iterator[None]:
        if size_bytes > MAX_HELD_BYTES:
            raise refusal(
                what, f"its completions take {size_bytes >> 20} MB of {MAX_HELD_BYTES >> 20} MB"
            )
        held_bytes = self._compiling_bytes + sum(self._held.values())
        if held_bytes + size_bytes > MAX_HELD_BYTES:
            raise QueueFullError(
                f"the grammars of running completions take {held_bytes >> 20} MB and "
                f"{size_bytes >> 20} MB more would exceed {MAX_HELD_BYTES >> 20} MB",
                hint="try again later",
            )
        self._compiling_bytes += size_bytes
        try:
            yield
        finally:
            self._compiling_bytes -= size_bytes


def _start(
    threads: ThreadPoolExecutor, work: Callable[[], T], given_up: threading.Event
) -> asyncio.Future[T | None]:
    """Has `work` done on a thread with four times the stack of a trial; None if it is given up
    before it begins."""
    before = threading.stack_size(4 * STACK_BYTES)
    try:
        return asyncio.get_running_loop().run_in_executor(
            threads, lambda: None if given_up.is_set() else work()
        )
    finally:
        threading.stack_size(before)
