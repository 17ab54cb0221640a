"""A request on its way through the inference scheduler: its tokens and what of it is cached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dualray.inference.block_pool import blocks_for
from dualray.inference.plan import Owner, SampleSpec
from dualray.inference.prefix_cache import Key, extend_keys
from dualray.inference.request import FinishReason, Request
from dualray.inference.speculation import Speculation
from dualray.inference.token_history import TokenHistory


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Prompt and completion of one request, and the blocks that hold its latents.

    Waiting, it holds no block; a preempted one waits again and has all its tokens still to run.
    """

    request: Request
    arrival: int
    """Requests are numbered as they come."""
    ids: list[int]
    """Prompt and completion so far."""
    max_length: int
    """Length of prompt plus completion at which it ends."""
    history: TokenHistory
    owner: Owner | None = None
    """Who holds its blocks; None while it waits."""
    blocks: tuple[int, ...] = ()
    """In order of position; they hold num_run tokens or more."""
    num_run: int = 0
    """Tokens whose latents are in the cache, or will be when the current step ends."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were found in the cache and not run; what a preempted one finds
    again does not count."""
    num_preemptions: int = 0
    """How often it had to give its blocks back."""
    num_known: int = 0
    """Its first blocks that others may find."""
    speculation: Speculation | None = None
    """None if nothing is drafted for it."""
    _keys: list[Key] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, arrival: int, max_context: int) -> Sequence:
        """A request that has just come."""
        length = len(request.prompt_ids) + request.params.max_tokens
        return cls(
            request=request,
            arrival=arrival,
            ids=list(request.prompt_ids),
            max_length=min(length, max_context),
            history=TokenHistory(
                request.params,
                request.prompt_ids,
                grammar=request.grammar,
                bad_words=request.bad_words,
            ),
        )

    @property
    def num_output(self) -> int:
        """Tokens of the completion so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def num_left(self) -> int:
        """Known tokens that are still to run; 1 while it decodes."""
        return len(self.ids) - self.num_run

    @property
    def reuses(self) -> bool:
        """Whether blocks that others have filled will do.

        Not where the prompt is scored, for which every row of it must run. Once a token is out
        the scores are out too.
        """
        return self.request.params.prompt_logprobs is None or self.num_output > 0

    def keys(self, count: int, block_size: int) -> list[Key]:
        """What its first `count` blocks are known by, at least; all of their ids are known."""
        extend_keys(self._keys, self.ids, count, block_size)
        return self._keys

    def blocks_to_run(self, block_size: int) -> int:
        """Blocks that it lacks for all tokens it has."""
        return max(0, blocks_for(len(self.ids), block_size) - len(self.blocks))

    def blocks_to_end(self, block_size: int) -> int:
        """Blocks that it may still take, at most."""
        return max(0, blocks_for(self.max_length, block_size) - len(self.blocks))

    def sample_specs(
        self, eos_id: int | None, drafts: Iterable[int] = ()
    ) -> tuple[SampleSpec, ...]:
        """How to choose the token behind the last one, and behind each draft if all those up to
        it come true."""
        specs = [self._sample_spec(eos_id, self.history, 0)]
        history = self.history
        for place, draft in enumerate(drafts, start=1):
            history = history.after(draft)
            specs.append(self._sample_spec(eos_id, history, place))
        return tuple(specs)

    def _sample_spec(self, eos_id: int | None, history: TokenHistory, place: int) -> SampleSpec:
        """Of the token `place` places behind the next one, whose `history` it has."""
        params = self.request.params
        banned: tuple[int, ...] = ()
        if self.num_output + place < params.min_tokens:
            banned = params.stop_token_ids
            if eos_id is not None and not params.ignore_eos:
                banned = (*banned, eos_id)
        return SampleSpec(
            position=len(self.ids) + place,
            seed=self.request.seed,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            logprobs=params.logprobs,
            adjust=history.adjustment(banned),
        )

    def add(self, token: int) -> None:
        """Notes a chosen token; whatever comes before it was run, accepted drafts included."""
        self.num_run = len(self.ids)
        self.ids.append(token)
        self.history.add(token)

    def finish(self, eos_id: int | None) -> tuple[FinishReason | None, bool]:
        """Why the last token ends the completion, and whether it itself is what ended it."""
        params, token = self.request.params, self.ids[-1]
        if token in params.stop_token_ids or (token == eos_id and not params.ignore_eos):
            return FinishReason.STOP, True
        if self.history.error is not None:
            return FinishReason.ERROR, False
        if self.history.is_complete:
            return FinishReason.STOP, False
        if len(self.ids) >= self.max_length:
            return FinishReason.LENGTH, False
        return None, False
