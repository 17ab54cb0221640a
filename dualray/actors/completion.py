"""One request's answer on its way from the engine to whoever asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from dualray.inference.detokenizer import IncrementalText
from dualray.inference.plan import PromptScored, Sampled
from dualray.inference.request import FinishReason, Request
from dualray.inference.scheduler import Progress


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Which weights answer: stamped on every completion."""

    training_step: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a completion has gained since the last one: whole characters, one or more tokens."""

    text: str
    tokens: tuple[Sampled, ...]
    finish: FinishReason | None = None
    matched_stop: str | None = None
    prompt: tuple[Sampled, ...] | None = None
    """The prompt's tokens but the first, scored as if chosen: in the first delta of a request that
    asks for them, None elsewhere."""


class Completion:
    """A stream of deltas; iterate it to its end, or cancel it.

    The engine's side calls `take` and `fail`, and notes when what happened: `started_ns` is the
    first step that ran the request. Nanoseconds of the monotonic clock, None before.

    With `every_token` a token comes as soon as it is made, for readers who make the text
    themselves; its text follows when it may be shown. With an `interval_s` a delta comes no sooner
    than that after the one before, unless it is the last, and brings what was made between.
    """

    def __init__(
        self,
        request: Request,
        text: IncrementalText,
        weights: Weights,
        on_cancel: Callable[[Completion], None],
        *,
        every_token: bool = False,
        interval_s: float = 0.0,
    ) -> None:
        self.request = request
        self.weights = weights
        self.arrived_ns = time.monotonic_ns()
        self.started_ns: int | None = None
        self.first_token_ns: int | None = None
        self.last_token_ns: int | None = None
        self.finish: FinishReason | None = None
        """Why it has ended, once it has."""
        self.num_tokens = 0
        self.num_preemptions = 0
        """How often it lost its blocks and began anew."""
        self.num_cached_tokens = 0
        """Tokens of the prompt that were found in the cache and not run."""
        self.timer: asyncio.TimerHandle | None = None
        self._text = text
        self._on_cancel = on_cancel
        self._every_token = every_token
        self._interval_ns = round(interval_s * 1e9)
        self._given_ns = 0
        """When the last delta was given."""
        self._held: list[Sampled] = []
        self._held_text = ""
        wanted = request.params.prompt_logprobs is not None
        self._prompt: list[Sampled] | None = [] if wanted else None
        self._items: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        """What a slow reader has not taken yet: no more than max_tokens allow, of which
        `check_call` limits what the completions of a call hold together."""

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yields deltas up to the one with `finish`.

        Raises:
            DeadlineError: the deadline or the server's limit passed.
            NotServingError: the workers were lost or the server stopped.
            ServerFaultError: the model gave no number.
        """
        while True:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish is not None:
                return

    async def whole(self) -> Delta:
        """All deltas as one. Raises what iterating raises."""
        text, tokens, prompt = "", (), None
        async for delta in self:
            text += delta.text
            tokens += delta.tokens
            prompt = delta.prompt if prompt is None else prompt
        return replace(delta, text=text, tokens=tokens, prompt=prompt)

    def cancel(self) -> None:
        """Ends the request and frees its blocks at once; nothing happens if it has ended."""
        self._on_cancel(self)

    def abort(self) -> None:
        """Cancels for somebody else than the reader, whose stream ends with finish `abort`."""
        self.cancel()
        self._held_text += self._text.finish()
        # What has ended before is read up to its own end, and this never.
        self._give(FinishReason.ABORT)

    def take_prompt(self, scored: PromptScored) -> None:
        """Adds what was scored of the prompt; a preempted request's parts may come again."""
        if self._prompt is not None:
            assert scored.first_position <= len(self._prompt) + 1, "a part is missing"
            self._prompt += scored.tokens[len(self._prompt) + 1 - scored.first_position :]

    def take(self, progress: Progress) -> FinishReason | None:
        """Adds a token; returns why the completion has ended, if it has.

        Tokens whose text may not be shown yet are held for the next delta, but for `every_token`;
        so is all that comes within the interval.
        """
        finish = progress.finish
        self.num_cached_tokens = progress.num_cached_tokens
        self.num_preemptions = progress.num_preemptions
        self.num_tokens += 1
        self._held.append(progress.sampled)
        if not progress.stop_token:
            check = self.num_tokens > self.request.params.min_tokens
            self._held_text += self._text.push(progress.sampled.token_id, check_stop=check)
        if self._text.matched_stop is not None:
            finish = FinishReason.STOP
        elif finish is not None:
            self._held_text += self._text.finish()
        if finish is not None or ((self._held_text or self._every_token) and self._is_due()):
            self._give(finish)
        return finish

    def _is_due(self) -> bool:
        if not self._interval_ns:
            return True
        return time.monotonic_ns() >= self._given_ns + self._interval_ns

    def _give(self, finish: FinishReason | None) -> None:
        """All that is held, as the next delta."""
        delta = Delta(
            text=self._held_text,
            tokens=tuple(self._held),
            finish=finish,
            matched_stop=self._text.matched_stop,
            prompt=None if self._prompt is None else tuple(self._prompt),
        )
        self._held.clear()
        self._held_text = ""
        self._prompt = None
        if self._interval_ns:
            self._given_ns = time.monotonic_ns()
        self._items.put_nowait(delta)

    def fail(self, error: Exception) -> None:
        """Makes the reader raise `error` after all the text that there is."""
        self._held_text += self._text.take_held()  # the error may be the tokenizer's
        if self._held_text:
            self._give(None)
        self._items.put_nowait(error)
