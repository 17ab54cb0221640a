"""A served request: what the caller asked for, checked field by field.

Names and defaults of the sampling parameters are vLLM's, so that existing clients need no
change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from dualray.errors import RequestError
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.parameter_values import require
from dualray.inference.sampling_parsers import PARSERS, read_parameters
from dualray.inference.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
"""Most alternatives per token that a request may ask for (vLLM's limit)."""

MAX_BIASES = 300
"""Most entries of `logit_bias` (OpenAI's limit)."""

MAX_N = 128
"""Most completions of one request (OpenAI's limit)."""

MAX_BAD_WORDS = 128
"""Most entries of `bad_words`."""

MAX_BAD_WORD = 256
"""Longest entry of `bad_words` in characters."""

MAX_STOPS = 64
"""Most entries of `stop` (OpenAI takes 4)."""

MAX_STOP = 1024
"""Longest entry of `stop` in characters."""

MAX_STOP_IDS = 4096
"""Most different ids in `stop_token_ids`."""

MAX_ALLOWED_IDS = 1 << 18
"""Most different ids in `allowed_token_ids`: twice DeepSeek-V3's vocabulary."""

MAX_INT = (1 << 63) - 1
"""Largest number of what is counted: those who keep records of requests know 64 bits."""

_NUM_SEEDS = 1 << 64


class ModelNotFoundError(RequestError):
    """The request names a model or version that is not served."""


class QueueFullError(RequestError):
    """Too many requests wait already."""


class NotServingError(RequestError):
    """The workers are training, draining or lost."""

    def __init__(self, sentence: str, *, hint: str, retry_after_s: float | None = None) -> None:
        """`retry_after_s` is when to ask again, if that may help."""
        super().__init__(sentence, hint=hint)
        self.retry_after_s = retry_after_s


class NoWeightsError(RequestError):
    """Nothing has been trained or loaded yet."""


class DeadlineError(RequestError):
    """The caller's deadline or the server's time limit passed."""


class ServerFaultError(RequestError):
    """Our own fault: the model gave no number for a token."""


class FinishReason(StrEnum):
    """Why a completion ended (vLLM's words)."""

    STOP = "stop"
    """End of sequence, a stop string or a stop token."""
    LENGTH = "length"
    """max_tokens or the context's end."""
    ABORT = "abort"
    """Cancelled by the caller or by its deadline."""
    ERROR = "error"
    """The server failed."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end. `parse` builds it from untyped input."""

    n: int = 1
    """Completions of the same prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keeps this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drops tokens below this fraction of the likeliest token's probability, in [0, 1]."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens chosen before, in [-2, 2]; the prompt does not count."""
    frequency_penalty: float = 0.0
    """Taken once for every time that the token was chosen before, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or completion, multiplies others; in (0, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit, in [-100, 100]) before penalties and temperature."""
    allowed_token_ids: tuple[int, ...] = ()
    """Token ids to choose from; () for all."""
    bad_words: tuple[str, ...] = ()
    """Words whose last token is not chosen behind their other tokens."""
    structured_outputs: StructuredOutputs | None = None
    """What the completion must be."""
    seed: int | None = None
    """Makes the choice repeatable, 64 bits with a sign or without; None draws a fresh seed per
    request."""
    max_tokens: int = 16
    """Most tokens to generate."""
    min_tokens: int = 0
    """Tokens to generate before anything but length, or a grammar that allows nothing more, may end
    the completion."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string in the text."""
    skip_special_tokens: bool = True
    """Leave the text of special tokens out."""
    logprobs: int | None = None
    """Alternatives to report per token; 0 reports the chosen token only."""
    prompt_logprobs: int | None = None
    """Alternatives to report per prompt token but the first, beside it; None scores no prompt."""
    truncate_prompt_tokens: int | None = None
    """Keep so many of the prompt's last tokens; -1 as many as leave room for max_tokens, None
    refuses a prompt that is too long."""

    def __post_init__(self) -> None:
        for name in ("allowed_token_ids", "stop_token_ids"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        require(1 <= self.n <= MAX_N, "n", self.n, f"must lie between 1 and {MAX_N}")
        require(self.temperature >= 0, "temperature", self.temperature, "must be 0 or more")
        require(self.n == 1 or self.temperature > 0, "n", self.n, "must be 1 at temperature 0")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        require(self.top_k >= -1, "top_k", self.top_k, "must be -1, 0 (all) or more")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie between 0 and 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, name, value, "must lie between -2 and 2")
        require(
            0 < self.repetition_penalty <= 2,
            "repetition_penalty",
            self.repetition_penalty,
            "must be above 0 and at most 2",
        )
        self._check_bias()
        self._check_choices()
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        require(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must lie between 0 and max_tokens, which is {self.max_tokens}",
        )
        self._check_strings("stop", MAX_STOPS, MAX_STOP)
        self._check_ids("stop_token_ids", MAX_STOP_IDS, "must not contain a negative id")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                name,
                value,
                f"must lie between 0 and {MAX_LOGPROBS}",
            )
        keep = self.truncate_prompt_tokens
        require(
            keep is None or keep == -1 or keep >= 1,
            "truncate_prompt_tokens",
            keep,
            "must be -1 or at least 1",
        )
        for name in ("top_k", "max_tokens", "truncate_prompt_tokens"):
            value = getattr(self, name)
            require((value or 0) <= MAX_INT, name, value, f"must be at most {MAX_INT}")
        require(
            self.seed is None or -_NUM_SEEDS // 2 <= self.seed < _NUM_SEEDS,
            "seed",
            self.seed,
            "must have at most 64 bits",
        )

    def each(self) -> list[SamplingParams]:
        """Parameters of the n completions; seeds count up, and the first is the request's own.

        The first one scores the prompt for all.
        """
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else _seed(self.seed + i) for i in range(self.n)]
        scores = [self.prompt_logprobs] + [None] * (self.n - 1)
        return [
            replace(self, n=1, seed=seed, prompt_logprobs=score)
            for seed, score in zip(seeds, scores)
        ]

    def _check_bias(self) -> None:
        bias = dict(self.logit_bias)
        size = f"{len(self.logit_bias)} entries long"
        require(
            len(self.logit_bias) <= MAX_BIASES,
            "logit_bias",
            size,
            f"must have at most {MAX_BIASES}",
        )
        require(
            len(bias) == len(self.logit_bias),
            "logit_bias",
            list(self.logit_bias),
            "must name a token id once",
        )
        require(all(i >= 0 for i in bias), "logit_bias", bias, "must not contain a negative id")
        require(
            all(-100 <= b <= 100 for b in bias.values()),
            "logit_bias",
            bias,
            "must have biases between -100 and 100",
        )

    def _check_choices(self) -> None:
        ids = self.allowed_token_ids
        self._check_ids("allowed_token_ids", MAX_ALLOWED_IDS, "must not be negative")
        require(
            not (ids and self.structured_outputs),
            "allowed_token_ids",
            list(ids),
            "cannot be combined with structured_outputs",
        )
        self._check_strings("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD)

    def _check_ids(self, name: str, most: int, not_negative: str) -> None:
        ids = getattr(self, name)
        require(len(ids) <= most, name, f"{len(ids)} ids long", f"must be at most {most}")
        require(min(ids, default=0) >= 0, name, list(ids), not_negative)

    def _check_strings(self, name: str, most: int, longest: int) -> None:
        texts = getattr(self, name)
        unit = "words" if name == "bad_words" else "strings"
        size = f"{len(texts)} {unit} long"
        require(len(texts) <= most, name, size, f"must be at most {most}")
        require(all(texts), name, list(texts), "must not contain an empty string")
        length = max(map(len, texts), default=0)
        rule = f"must not contain one of more than {longest} characters"
        require(length <= longest, name, f"of up to {length} characters", rule)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Builds from JSON-like values; numbers may come as strings.

        Raises:
            RequestError: a name is unknown or not offered, or a value breaks its rule.
        """
        return cls(**read_parameters(values))


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to make. `seed` is always set: a request without one gets a random one."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int
    deadline: float | None = None
    """When to give up, in the engine clock's seconds."""
    grammar: GrammarMatcher | None = field(default=None, compare=False)
    """At the completion's beginning; the request's own."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of what must not be said."""

    def __post_init__(self) -> None:
        assert self.params.n == 1, "n completions are n requests"
        wanted = self.params.structured_outputs is not None
        assert wanted == (self.grammar is not None), "structured_outputs are compiled first"


def check_prompt(prompt_ids: Sequence[int], max_context: int, name: str = "text_input") -> None:
    """Refuses an empty prompt and one that leaves no room for a single new token."""
    if not prompt_ids:
        raise RequestError(
            f"{name} is empty and the model needs at least one token to continue",
            hint="send a prompt",
            field=name,
        )
    if len(prompt_ids) >= max_context:
        raise RequestError(
            f"{name} has {len(prompt_ids)} tokens and must leave room for one more in the "
            f"context of {max_context}",
            hint=f"shorten the prompt to at most {max_context - 1} tokens",
            field=name,
        )


def check_token_ids(params: SamplingParams, vocab_size: int, eos_id: int | None) -> None:
    """Refuses ids that the vocabulary does not have, and min_tokens where every token would end
    the completion."""
    rule = f"must be below the vocabulary size {vocab_size}"
    for name in ("stop_token_ids", "allowed_token_ids"):
        ids = getattr(params, name)
        require(max(ids, default=0) < vocab_size, name, list(ids), rule)
    require(
        all(token < vocab_size for token, _ in params.logit_bias),
        "logit_bias",
        dict(params.logit_bias),
        f"must name ids below the vocabulary size {vocab_size}",
    )
    if params.min_tokens:
        ending = {*params.stop_token_ids, *(() if params.ignore_eos else (eos_id,))}
        require(
            not ending.issuperset(params.allowed_token_ids or range(vocab_size)),
            "min_tokens",
            params.min_tokens,
            "must be 0 where every token that may be chosen ends the completion",
        )


def _seed(number: int) -> int:
    """The seed of 64 bits that makes the same choices."""
    return number if number < _NUM_SEEDS else number - _NUM_SEEDS


assert set(PARSERS) == {f.name for f in fields(SamplingParams)}
