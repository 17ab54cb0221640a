"""What the lm-eval harness asks of a generation, as sampling parameters.

Its words are those of several engines at once: vLLM's, and Hugging Face's `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualray.errors import RequestError

DEFAULT_MAX_TOKENS = 256
"""The harness' own default."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = (
    *("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "seed", "ignore_eos"),
)
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "n": 1}
"""What may be asked for if it asks for nothing."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How to complete a prompt."""

    until: tuple[str, ...]
    """Strings that end the completion and are no part of it."""
    max_tokens: int
    sampling: Mapping[str, Any]
    """All of it as vLLM's sampling parameters."""

    def cut(self, text: str) -> str:
        """`text` up to the first of the strings that end it."""
        ends = [place for end in self.until if (place := text.find(end)) >= 0]
        return text[: min(ends)] if ends else text


def read_generation(given: Mapping[str, Any], max_context: int) -> Generation:
    """Reads a task's `generation_kwargs`. Greedy unless do_sample or a temperature says otherwise;
    at most so many tokens that one of the prompt fits into the context too.

    Raises:
        RequestError: naming an argument that the server does not offer.
    """
    values = dict(given)
    until = values.pop("until", None) or []
    until = tuple(filter(None, [until] if isinstance(until, str) else until))
    limits = [int(values.pop(name)) for name in _LIMITS if values.get(name) is not None]
    max_tokens = min(limits[0] if limits else DEFAULT_MAX_TOKENS, max_context - 1)
    temperature = values.pop("temperature", None)
    do_sample = values.pop("do_sample", None)
    if do_sample is None:
        do_sample = bool(temperature)
    if not do_sample:
        temperature = 0.0
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 1.0 if temperature is None else float(temperature),
    }
    if until:
        sampling["stop"] = list(until)
    for name, value in values.items():
        if value is None or (name in _NEUTRAL and value == _NEUTRAL[name]):
            continue
        if name not in _SAMPLING:
            raise RequestError(
                f"generation_kwargs.{name} is {value} and the server does not offer it",
                hint=f"leave it out; known are until, do_sample, temperature, {_LIMITS[0]}, "
                f"{', '.join(_SAMPLING)}",
                field=name,
            )
        sampling[name] = value
    return Generation(until=until, max_tokens=max_tokens, sampling=sampling)
