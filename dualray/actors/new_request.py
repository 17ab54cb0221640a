"""From a caller's prompt and parameters to a `Request`, and to what makes text of its tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from dualray.actors.bad_words import bad_word_ids
from dualray.actors.prompt_ids import prompt_ids_of
from dualray.data.tokenizer import Tokenizer
from dualray.inference.detokenizer import IncrementalText
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.request import Request, SamplingParams, check_token_ids

_NUM_CONTEXT = 8
"""Tokens of the prompt that a completion's first ones are read behind."""


def new_request(
    request_id: str,
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    max_context: int,
    deadline: float,
    grammar: GrammarMatcher | None,
) -> Request:
    """Checks what only the tokenizer can, and draws a seed where none is given.

    Raises:
        RequestError: prompt or parameters break a rule.
    """
    prompt_ids = checked_prompt(prompt, params, tokenizer=tokenizer, max_context=max_context)
    return Request(
        request_id=request_id,
        prompt_ids=prompt_ids,
        params=params,
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        deadline=deadline,
        grammar=grammar,
        bad_words=bad_word_ids(params.bad_words, tokenizer),
    )


def checked_prompt(
    prompt: str | Sequence[int],
    params: SamplingParams,
    *,
    tokenizer: Tokenizer,
    max_context: int,
) -> tuple[int, ...]:
    """The prompt's ids, once these and those of the parameters are right.

    Raises:
        RequestError: prompt or parameters break a rule.
    """
    check_token_ids(params, tokenizer.vocab_size, tokenizer.eos_id)
    return prompt_ids_of(prompt, tokenizer, max_context, params)


def text_of(request: Request, tokenizer: Tokenizer) -> IncrementalText:
    """Assembles the request's completion."""
    params = request.params
    return IncrementalText(
        tokenizer,
        context=request.prompt_ids[-_NUM_CONTEXT:],
        stop=params.stop,
        include_stop=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        encode=tokenizer.encode,
    )
