"""A request on its way through the inference scheduler: its tokens and what of it is cached."""

from __future__ import annotations

from dataclasses import dataclass

from dualray.inference.plan import Owner, SampleSpec
from dualray.inference.request import FinishReason, Request
from dualray.inference.token_history import TokenHistory


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Prompt and completion of one request, and the blocks that hold its latents."""

    request: Request
    owner: Owner
    blocks: tuple[int, ...]
    ids: list[int]
    """Prompt and completion so far."""
    max_length: int
    """Length of prompt plus completion at which it ends."""
    history: TokenHistory
    num_run: int = 0
    """Tokens whose latents are in the cache, or will be when the current step ends."""

    @property
    def num_output(self) -> int:
        """Tokens of the completion so far."""
        return len(self.ids) - len(self.request.prompt_ids)

    def sample_spec(self, eos_id: int | None) -> SampleSpec:
        """How to choose the token behind the last one."""
        params = self.request.params
        banned: tuple[int, ...] = ()
        if self.num_output < params.min_tokens:
            banned = params.stop_token_ids
            if eos_id is not None and not params.ignore_eos:
                banned = (*banned, eos_id)
        return SampleSpec(
            position=len(self.ids),
            seed=self.request.seed,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            min_p=params.min_p,
            logprobs=params.logprobs,
            adjust=self.history.adjustment(banned),
        )

    def add(self, token: int) -> None:
        """Notes a chosen token."""
        self.ids.append(token)
        self.history.add(token)

    def finish(self, eos_id: int | None) -> tuple[FinishReason | None, bool]:
        """Why the last token ends the completion, and whether it itself is what ended it."""
        params, token = self.request.params, self.ids[-1]
        if token in params.stop_token_ids or (token == eos_id and not params.ignore_eos):
            return FinishReason.STOP, True
        if len(self.ids) >= self.max_length:
            return FinishReason.LENGTH, False
        return None, False
