"""Sampling parameters by name: how each is read, and which of vLLM's this server does not offer.

What is not offered is refused unless it carries its neutral value: nothing a caller sets is
silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from dualray.errors import RequestError
from dualray.inference.parameter_values import (
    nearest,
    quoted,
    read_biases,
    read_bool,
    read_float,
    read_float_or,
    read_int,
    read_ints,
    read_optional_int,
    read_strings,
)
from dualray.inference.structured_outputs import read_structured_outputs

NOT_OFFERED: Mapping[str, Any] = {
    "best_of": 1,
    "detokenize": True,
    "spaces_between_special_tokens": True,
    "guided_decoding": None,
    "use_beam_search": False,
    "length_penalty": 1,
    "early_stopping": False,
    "logits_processors": None,
    "extra_args": None,
}
"""vLLM's parameters that we know and do not offer, with the value that asks for nothing."""

_INSTEAD = {"guided_decoding": "use structured_outputs"}

PARSERS = {
    "n": lambda name, value: 1 if value is None else read_int(name, value),
    "temperature": read_float,
    "top_p": read_float,
    "top_k": read_int,
    "min_p": read_float,
    "presence_penalty": partial(read_float_or, 0.0),
    "frequency_penalty": partial(read_float_or, 0.0),
    "repetition_penalty": partial(read_float_or, 1.0),
    "logit_bias": read_biases,
    "allowed_token_ids": read_ints,
    "bad_words": read_strings,
    "structured_outputs": read_structured_outputs,
    "seed": read_optional_int,
    "max_tokens": read_int,
    "min_tokens": read_int,
    "stop": read_strings,
    "stop_token_ids": read_ints,
    "ignore_eos": read_bool,
    "include_stop_str_in_output": read_bool,
    "skip_special_tokens": read_bool,
    "logprobs": read_optional_int,
    "prompt_logprobs": read_optional_int,
    "truncate_prompt_tokens": read_optional_int,
}


def read_parameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field of `SamplingParams`, out of JSON-like ones; numbers may come as strings.

    Raises:
        RequestError: a name is unknown or not offered, or a value has the wrong type.
    """
    known: dict[str, Any] = {}
    for name, value in values.items():
        if name in NOT_OFFERED:
            _neutral(name, value)
        elif name in PARSERS:
            known[name] = PARSERS[name](name, value)
        else:
            raise _unknown(name)
    return known


def _neutral(name: str, value: object) -> None:
    neutral = NOT_OFFERED[name]
    if value is None or value == neutral or str(value) == str(neutral):
        return
    raise RequestError(
        f"sampling_parameters.{name} is {value} and this server does not offer {name}",
        hint=_INSTEAD.get(name, f"leave it out or set it to {json.dumps(neutral)}"),
        field=name,
    )


def _unknown(name: str) -> RequestError:
    near = nearest(name, [*PARSERS, *NOT_OFFERED])
    return RequestError(
        f"sampling_parameters.{quoted(name)} is not a sampling parameter",
        hint=f"did you mean {near}?" if near else "known are " + ", ".join(PARSERS),
        field=quoted(name),
    )
