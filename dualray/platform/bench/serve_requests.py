"""What the serving benchmark asks for: prompts of given lengths, and when they arrive.

Prompts are passages of real text, cut so that the tokenizer makes exactly as many tokens of them
as asked for. Everything follows from a seed, so that both sides get the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualray.data.tokenizer import Tokenizer

_TRIES = 200


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """One completion, greedy and of exactly `max_tokens` tokens."""

    name: str
    prompt: str
    prompt_ids: tuple[int, ...]
    """What the tokenizer makes of `prompt`."""
    max_tokens: int
    arrives_s: float = 0.0
    """Seconds after the first one."""
    forced_id: int | None = None
    """A token so favoured that the completion is nothing else, or None."""

    @property
    def sampling(self) -> dict[str, object]:
        """Its sampling parameters, by vLLM's names."""
        biases = {} if self.forced_id is None else {"logit_bias": {str(self.forced_id): 100.0}}
        return {"temperature": 0, "max_tokens": self.max_tokens, "ignore_eos": True, **biases}


def num_tokens(requests: Sequence[BenchRequest]) -> int:
    """Tokens that these generate together."""
    return sum(request.max_tokens for request in requests)


def equal_requests(
    tokenizer: Tokenizer, text: str, *, count: int, prompt_tokens: int, new_tokens: int, seed: int
) -> list[BenchRequest]:
    """Requests of one size, all there at once."""
    rng = random.Random(seed)
    return [
        _request(tokenizer, text, rng, f"r{index}", prompt_tokens, new_tokens)
        for index in range(count)
    ]


def arriving_requests(
    tokenizer: Tokenizer,
    text: str,
    *,
    count: int,
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
    per_s: float,
    seed: int,
) -> list[BenchRequest]:
    """Requests of mixed lengths that come in a Poisson process of `per_s` a second.

    Lengths are even in their logarithm between the bounds: many are short and a few long.
    """
    rng = random.Random(seed)
    requests = []
    arrives_s = 0.0
    for index in range(count):
        sizes = [
            round(low * (high / low) ** rng.random()) for low, high in (prompt_tokens, new_tokens)
        ]
        request = _request(tokenizer, text, rng, f"m{index}", *sizes)
        requests.append(replace(request, arrives_s=arrives_s))
        arrives_s += rng.expovariate(per_s)
    return requests


def _request(
    tokenizer: Tokenizer, text: str, rng: random.Random, name: str, prompt_tokens: int, new: int
) -> BenchRequest:
    for _ in range(_TRIES):
        start = rng.randrange(max(1, len(text) - 16 * prompt_tokens))
        ids = tokenizer.encode(text[start : start + 16 * prompt_tokens])[:prompt_tokens]
        prompt = tokenizer.decode(ids)
        # A cut within a word or a character may be encoded otherwise than it was.
        if len(ids) == prompt_tokens and tokenizer.encode(prompt) == ids:
            return BenchRequest(name=name, prompt=prompt, prompt_ids=tuple(ids), max_tokens=new)
    raise AssertionError(f"no passage of {prompt_tokens} tokens in {len(text)} characters")
