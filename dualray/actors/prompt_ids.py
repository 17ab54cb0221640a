"""A prompt's token ids, from text or as the caller made them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dualray.data.tokenizer import Tokenizer
from dualray.errors import RequestError
from dualray.inference.request import SamplingParams, check_prompt

_MOST_BYTES = 4
"""Of a character."""


def prompt_ids_of(
    prompt: str | Sequence[int], tokenizer: Tokenizer, max_context: int, params: SamplingParams
) -> tuple[int, ...]:
    """The ids that the model reads: all of them or, with truncate_prompt_tokens, the last.

    Raises:
        RequestError: the prompt is empty, too long, or has an id outside the vocabulary.
    """
    keep = params.truncate_prompt_tokens
    if isinstance(prompt, str):
        if keep is None:
            _check_length(prompt, tokenizer, max_context)
        ids, name = tuple(tokenizer.encode(prompt)), "text_input"
    else:
        ids, name = tuple(prompt), "input_ids"
    size = tokenizer.vocab_size
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise RequestError(
            f"{name} has token {wrong} and the vocabulary has the ids 0 to {size - 1}",
            hint="use the tokenizer of this model",
            field=name,
        )
    if keep is not None:
        ids = ids[-(max(1, max_context - params.max_tokens) if keep == -1 else keep) :]
    check_prompt(ids, max_context, name)
    return ids


def _check_length(text: str, tokenizer: Tokenizer, max_context: int) -> None:
    """Refuses what no tokens of the vocabulary make short enough, without looking for them."""
    longest = tokenizer.max_token_bytes
    if longest is None or len(text) <= longest * max_context // _MOST_BYTES:
        return
    size = len(text.encode())
    if size > longest * max_context:
        raise RequestError(
            f"text_input has {size} bytes, which are {math.ceil(size / longest)} tokens or more, "
            f"and must leave room for one more in the context of {max_context}",
            hint=f"shorten the prompt to at most {max_context - 1} tokens",
            field="text_input",
        )
