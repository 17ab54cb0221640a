"""Which prompt tokens a step scores: plain data out of a request and what of it runs."""

from __future__ import annotations

from dualray.inference.plan import PromptSpec
from dualray.inference.request import Request


def prompt_spec(request: Request, first: int, count: int) -> PromptSpec | None:
    """What to score behind the rows of positions first .. first + count - 1; None for nothing.

    The prompt's last token has no successor in the prompt: what is behind it is chosen. Rows of
    the completion, which run again after a preemption, score nothing.
    """
    logprobs = request.params.prompt_logprobs
    targets = request.prompt_ids[first + 1 : first + count + 1]
    if logprobs is None or not targets:
        return None
    return PromptSpec(targets=targets, logprobs=logprobs)
