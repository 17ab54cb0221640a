"""A served request: what the caller asked for, checked field by field.

Names and defaults of the sampling parameters are vLLM's, so that existing clients need no
change. A parameter of theirs that this server does not offer is refused unless it carries
its neutral value: nothing a caller sets is silently ignored.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from dualray.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives per token that a request may ask for (vLLM's limit)."""

NOT_OFFERED: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "prompt_logprobs": None,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "use_beam_search": False,
    "length_penalty": 1,
    "early_stopping": False,
    "logits_processors": None,
    "extra_args": None,
}
"""vLLM's parameters that we know and do not offer, with the value that asks for nothing."""


class ModelNotFoundError(RequestError):
    """The request names a model or version that is not served."""


class QueueFullError(RequestError):
    """Too many requests wait already."""


class NotServingError(RequestError):
    """The workers are training, draining or lost."""


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

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Keeps the smallest set of tokens whose probability reaches this, in (0, 1]."""
    top_k: int = 0
    """Keeps this many most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drops tokens below this fraction of the likeliest token's probability, in [0, 1]."""
    seed: int | None = None
    """Makes the choice repeatable; None draws a fresh seed per request."""
    max_tokens: int = 16
    """Most tokens to generate."""
    min_tokens: int = 0
    """Tokens to generate before anything but length may end the completion."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion."""
    ignore_eos: bool = False
    """Go on after the end-of-sequence token."""
    include_stop_str_in_output: bool = False
    """Keep the matched stop string in the text."""
    logprobs: int | None = None
    """Alternatives to report per token; 0 reports the chosen token only."""

    def __post_init__(self) -> None:
        _rule(self.temperature >= 0, "temperature", self.temperature, "must be 0 or more")
        _rule(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        _rule(self.top_k >= -1, "top_k", self.top_k, "must be -1, 0 (all) or more")
        _rule(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie between 0 and 1")
        _rule(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        _rule(
            0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must lie between 0 and max_tokens, which is {self.max_tokens}",
        )
        _rule(all(self.stop), "stop", list(self.stop), "must not contain an empty string")
        _rule(
            all(i >= 0 for i in self.stop_token_ids),
            "stop_token_ids",
            list(self.stop_token_ids),
            "must not contain a negative id",
        )
        if self.logprobs is not None:
            _rule(
                0 <= self.logprobs <= MAX_LOGPROBS,
                "logprobs",
                self.logprobs,
                f"must lie between 0 and {MAX_LOGPROBS}",
            )

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Builds from JSON-like values; numbers may come as strings.

        Raises:
            RequestError: a name is unknown or not offered, or a value breaks its rule.
        """
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name in NOT_OFFERED:
                _neutral(name, value)
            elif name in _PARSERS:
                known[name] = _PARSERS[name](name, value)
            else:
                raise _unknown(name)
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One completion to make. `seed` is always set: a request without one gets a random one."""

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int
    deadline: float | None = None
    """When to give up, in the engine clock's seconds."""


def check_prompt(prompt_ids: Sequence[int], max_context: int) -> None:
    """Refuses an empty prompt and one that leaves no room for a single new token."""
    if not prompt_ids:
        raise RequestError(
            "text_input is empty and the model needs at least one token to continue",
            hint="send a prompt",
            field="text_input",
        )
    if len(prompt_ids) >= max_context:
        raise RequestError(
            f"text_input has {len(prompt_ids)} tokens and must leave room for one more in the "
            f"context of {max_context}",
            hint=f"shorten the prompt to at most {max_context - 1} tokens",
            field="text_input",
        )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuses stop token ids that the vocabulary does not have."""
    for token in params.stop_token_ids:
        _rule(
            token < vocab_size,
            "stop_token_ids",
            list(params.stop_token_ids),
            f"must be below the vocabulary size {vocab_size}",
        )


def _rule(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise RequestError(
            f"sampling_parameters.{name} is {value} and {rule}",
            hint=f"correct {name}",
            field=name,
        )


def _neutral(name: str, value: object) -> None:
    neutral = NOT_OFFERED[name]
    if value is None or value == neutral or str(value) == str(neutral):
        return
    raise RequestError(
        f"sampling_parameters.{name} is {value} and this server does not offer {name}",
        hint=f"leave it out or set it to {json.dumps(neutral)}",
        field=name,
    )


def _unknown(name: str) -> RequestError:
    near = difflib.get_close_matches(name, [*_PARSERS, *NOT_OFFERED], n=1)
    hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(_PARSERS)
    return RequestError(
        f"sampling_parameters.{name} is not a sampling parameter",
        hint=hint,
        field=name,
    )


def _float(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    _rule(math.isfinite(number), name, value, "must be a finite number")
    return number


def _int(name: str, value: object) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            _rule(False, name, repr(value), "must be a whole number")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    _rule(
        isinstance(value, int) and not isinstance(value, bool),
        name,
        value,
        "must be a whole number",
    )
    return value  # type: ignore[return-value]


def _optional_int(name: str, value: object) -> int | None:
    return None if value is None else _int(name, value)


def _bool(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    _rule(isinstance(value, bool), name, value, "must be true or false")
    return bool(value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    _rule(
        isinstance(value, list | tuple) and all(isinstance(s, str) for s in value),
        name,
        value,
        "must be a string or a list of strings",
    )
    return tuple(value)  # type: ignore[arg-type]


def _ints(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    _rule(isinstance(value, list | tuple), name, value, "must be a list of token ids")
    return tuple(_int(name, item) for item in value)  # type: ignore[union-attr]


_PARSERS = {
    "temperature": _float,
    "top_p": _float,
    "top_k": _int,
    "min_p": _float,
    "seed": _optional_int,
    "max_tokens": _int,
    "min_tokens": _int,
    "stop": _strings,
    "stop_token_ids": _ints,
    "ignore_eos": _bool,
    "include_stop_str_in_output": _bool,
    "logprobs": _optional_int,
}
assert set(_PARSERS) == {f.name for f in fields(SamplingParams)}
