"""Sampling parameters out of JSON-like values, where numbers may come as strings, and lists and
objects as JSON text: some clients' parameters know nothing else.

Every reader takes the parameter's name and its value and raises RequestError, naming both.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Iterable

from dualray.errors import RequestError

MAX_NAME = 256
"""Longest name in characters that a refusal repeats."""
_MAX_COMPARED = 64
"""Longest name in characters that is taken for a slip of the pen: comparing takes long."""


def quoted(name: str) -> str:
    """A caller's name of something, cut to what one wants to read."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was meant, if one is near."""
    if len(name) > _MAX_COMPARED:
        return None
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Refuses the parameter unless its rule holds."""
    if not holds:
        raise RequestError(
            f"sampling_parameters.{name} is {value} and {rule}",
            hint=f"correct {name}",
            field=name,
        )


def read_float(name: str, value: object) -> float:
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
    require(math.isfinite(number), name, value, "must be a finite number")
    return number


def read_int(name: str, value: object) -> int:
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            require(False, name, repr(value), "must be a whole number")
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    require(
        isinstance(value, int) and not isinstance(value, bool),
        name,
        value,
        "must be a whole number",
    )
    return value  # type: ignore[return-value]


def read_float_or(default: float, name: str, value: object) -> float:
    """A finite number; null asks for the default, as vLLM's penalties do."""
    return default if value is None else read_float(name, value)


def read_optional_int(name: str, value: object) -> int | None:
    return None if value is None else read_int(name, value)


def read_bool(name: str, value: object) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    require(isinstance(value, bool), name, value, "must be true or false")
    return bool(value)


def read_strings(name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    require(
        isinstance(value, list | tuple) and all(isinstance(s, str) for s in value),
        name,
        value,
        "must be a string or a list of strings",
    )
    return tuple(value)  # type: ignore[arg-type]


def read_ints(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    value = _plain(value)
    require(isinstance(value, list | tuple), name, value, "must be a list of token ids")
    return tuple(read_int(name, item) for item in value)  # type: ignore[union-attr]


def _plain(value: object) -> object:
    """What JSON text stands for; anything else, and what is no JSON, as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def read_biases(name: str, value: object) -> tuple[tuple[int, float], ...]:
    """An object of token ids, which JSON makes strings, and biases."""
    if value is None:
        return ()
    value = _plain(value)
    require(isinstance(value, dict), name, value, "must be an object of token ids and biases")
    return tuple(
        (read_int(name, token), read_float(name, bias))
        for token, bias in value.items()  # type: ignore[union-attr]
    )
