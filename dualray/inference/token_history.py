"""What a request has said so far, as its penalties and its bias need it.

Kept by the scheduler beside the request's tokens, so that the workers keep nothing between
steps: a plan carries all that its choices depend on, whichever worker holds the last stage. A
request that adjusts nothing has no history and its plans carry nothing more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from dualray.inference.plan import Adjustment
from dualray.inference.request import SamplingParams


class TokenHistory:
    """Token counts of one request, grown by a token at a time."""

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        self._bias = tuple((token, bias) for token, bias in params.logit_bias if bias)
        self._repeats = params.repetition_penalty != 1
        self._counts_output = bool(params.presence_penalty or params.frequency_penalty)
        # A dict keeps the order, so that equal requests send equal plans.
        self._seen: dict[int, None] = dict.fromkeys(prompt_ids) if self._repeats else {}
        self._output: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """Notes a chosen token."""
        if self._repeats:
            self._seen[token] = None
        if self._counts_output:
            self._output[token] += 1

    def adjustment(self, banned_ids: tuple[int, ...]) -> Adjustment | None:
        """What to change in the logits of the next token; None for nothing.

        Parameters whose tokens have not come up yet are left out: they would change nothing.
        """
        if not (banned_ids or self._bias or self._seen or self._output):
            return None
        return Adjustment(
            logit_bias=self._bias,
            repetition_penalty=self._params.repetition_penalty,
            seen_ids=tuple(self._seen),
            frequency_penalty=self._params.frequency_penalty,
            presence_penalty=self._params.presence_penalty,
            output_counts=tuple(self._output.items()),
            banned_ids=banned_ids,
        )
