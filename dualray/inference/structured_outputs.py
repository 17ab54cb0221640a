"""What a completion must be: the sampling parameter `structured_outputs`.

Names are vLLM's. This is the caller's word alone; whether a schema or a grammar makes sense is
found out by compiling it (`grammars`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dualray.errors import RequestError
from dualray.inference.parameter_values import (
    nearest,
    quoted,
    read_bool,
    read_strings,
    require,
)

MAX_BYTES = 64 * 1024
"""Longest constraint in bytes of UTF-8. What it takes to compile is bounded by its trial."""

_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_NOT_OFFERED = ("structural_tag", "disable_additional_properties")
_NAME = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of the first five is set."""

    json: str | None = None
    """JSON Schema as JSON text."""
    regex: str | None = None
    """Regular expression that the whole completion matches, in Rust's syntax: no look-around and
    no back-references."""
    choice: tuple[str, ...] = ()
    """The completion is one of these strings."""
    grammar: str | None = None
    """Context-free grammar, in Lark's notation or in GBNF."""
    json_object: bool = False
    """Any JSON object."""
    whitespace_pattern: str | None = None
    """Regular expression of the white space between JSON's tokens; None for JSON's own."""
    disable_any_whitespace: bool = False
    """No white space between JSON's tokens."""

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise RequestError(
                f"sampling_parameters.{_NAME} has {' and '.join(given) or 'no constraint'} and "
                "must have exactly one",
                hint=f"set one of {', '.join(_KINDS)}",
                field=_NAME,
            )
        size = sum(len(text.encode(errors="replace")) for text in self._texts())
        require(size <= MAX_BYTES, _NAME, f"{size} bytes long", f"must be at most {MAX_BYTES}")

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return self._given()[0]

    @property
    def is_json(self) -> bool:
        """White space between tokens is of no meaning."""
        return self.json is not None or self.json_object

    def _given(self) -> list[str]:
        return [name for name in _KINDS if getattr(self, name) not in (None, (), False)]

    def _texts(self) -> list[str]:
        texts = (self.json, self.regex, *self.choice, self.grammar, self.whitespace_pattern)
        return [text for text in texts if text is not None]


def read_structured_outputs(name: str, value: object) -> StructuredOutputs | None:
    """An object with vLLM's keys, or that object as JSON text; null asks for nothing."""
    if value is None:
        return None
    if isinstance(value, str):
        value = _json(name, value)
    require(isinstance(value, dict), name, value, 'must be an object such as {"regex": "a+"}')
    assert isinstance(value, dict)
    known: dict[str, Any] = {}
    for key, item in value.items():
        if key in _NOT_OFFERED:
            require(item in (None, False), f"{name}.{key}", item, "this server does not offer it")
        elif key not in _READERS:
            near = nearest(str(key), _READERS)
            raise RequestError(
                f"sampling_parameters.{name}.{quoted(str(key))} is no constraint",
                hint=f"did you mean {near}?" if near else f"known are {', '.join(_READERS)}",
                field=name,
            )
        elif item is not None:
            known[key] = _READERS[key](f"{name}.{key}", item)
    return StructuredOutputs(**known)


def _json(name: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        require(False, name, f"{len(text)} characters", "must be JSON")


def _schema(name: str, value: object) -> str:
    """A schema comes as an object or as JSON text."""
    if isinstance(value, str):
        value = _json(name, value)
    require(isinstance(value, dict | bool), name, value, "must be a JSON Schema")
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        require(False, name, "a schema", "must be JSON of finite numbers, nested less deeply")
        raise AssertionError from None


def _text(name: str, value: object) -> str:
    require(isinstance(value, str), name, value, "must be a string")
    return str(value)


def _choice(name: str, value: object) -> tuple[str, ...]:
    choices = read_strings(name, value)
    require(bool(choices), name, list(choices), "must have at least one string")
    return choices


_READERS = {
    "json": _schema,
    "regex": _text,
    "choice": _choice,
    "grammar": _text,
    "json_object": read_bool,
    "whitespace_pattern": _text,
    "disable_any_whitespace": read_bool,
}
