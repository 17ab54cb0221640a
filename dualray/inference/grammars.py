"""Grammars that hold a completion to what its caller asked for, token by token.

llguidance parses the bytes of the tokens and says which ones may come next. What a grammar takes
to compile is bounded by trying it in another process first (`trial_process`); what a mask takes
is bounded by `LIMITS`: a grammar whose cost shows later ends its own request. A lexer that has
been copied shares its states, and their number is limited, so that every completion gets a
matcher that was compiled for it.
"""

from __future__ import annotations

import json
from functools import cached_property

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from dualray.errors import RequestError
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.structured_outputs import StructuredOutputs
from dualray.inference.token_masks import ids_in

LIMITS = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 50_000,
    "max_items_in_row": 700,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
}
"""In llguidance's units. They count expressions, which may be of any size, and not rules or
references, for each of which the compiler recurses: some 10 kB of text crash it, or take 250 MB.

What passes its trial takes up to 25 ms a token, measured on one Zen 4 core: a row's items are
compared with each other, and at 2,000 of them a grammar that is ambiguous in every place took
more than 100. An object takes four for each property that may be left out."""

_FIELD = "structured_outputs"


class Grammars:
    """Compiles what completions must be, for one tokenizer. Safe to use from several threads.

    `tokenizer_json` is a tokenizer.json whose ids are bytes: byte-level, or with byte fallback.
    """

    def __init__(self, tokenizer_json: bytes, eos_id: int) -> None:
        self._json = tokenizer_json
        self._eos_id = eos_id

    def compile(self, what: StructuredOutputs) -> GrammarMatcher:
        """A matcher at the beginning of a completion. May take some hundred milliseconds.

        A grammar that nobody has tried may end the process, or take all its memory.

        Raises:
            RequestError: the grammar makes no sense, asks for too much, or nothing matches it.
        """
        tokenizer = self._tokenizer
        try:
            grammar = _grammar(what)
        except Exception as error:  # the converter raises whatever its own code stumbles over
            raise refusal(what, _first_line(error)) from None
        limits = LLParserLimits(**LIMITS, verbose_errors=False)
        inner = LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
        if inner.is_error():
            raise refusal(what, _first_line(inner.get_error()))
        matcher = GrammarMatcher(inner, self._eos_id)
        _try_first_token(matcher, what)
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Built when first used: a large vocabulary takes a second."""
        try:
            return LLTokenizer(self._json.decode(), eos_token=self._eos_id)
        except ValueError as error:
            raise RequestError(
                f"sampling_parameters.{_FIELD} is set and the tokenizer's tokens are no bytes: "
                f"{_first_line(error)}",
                hint="leave it out, or serve a model with a byte-level tokenizer",
                field=_FIELD,
            ) from None


def grammar_failure(matcher: GrammarMatcher | None) -> RequestError:
    """For the caller whose completion cannot go on."""
    reason = None if matcher is None else matcher.error
    return RequestError(
        f"the completion cannot go on in its grammar: {reason}",
        hint=f"make {_FIELD} simpler",
        field=_FIELD,
    )


def _grammar(what: StructuredOutputs) -> str:
    """The constraint in llguidance's words."""
    if what.is_json:
        schema = '{"type": "object"}' if what.json is None else what.json
        # A schema may carry options of its own, and could ask to be taken less literally.
        options = {
            "lenient": False,
            "whitespace_flexible": not what.disable_any_whitespace,
            "whitespace_pattern": what.whitespace_pattern,
        }
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)
    if what.regex is not None:
        return LLMatcher.grammar_from_regex(what.regex)
    if what.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(what.grammar))
    # JSON's strings are Lark's.
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, what.choice)))


def _try_first_token(matcher: GrammarMatcher, what: StructuredOutputs) -> None:
    """Some grammars show what they cost, or that nothing matches, once they are used."""
    trial = matcher.copy()
    token = next(ids_in(trial.allowed()), None)
    if token is not None and trial.accept(token):
        trial.allowed()
    if trial.error is not None or token is None:
        raise refusal(what, trial.error or "nothing matches it")


def refusal(what: StructuredOutputs, reason: str) -> RequestError:
    """For the caller of a grammar that cannot be compiled."""
    return RequestError(
        f"sampling_parameters.{_FIELD}.{what.kind} cannot be used: {reason}",
        hint=f"correct {_FIELD}.{what.kind}",
        field=_FIELD,
    )


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 200 else line[:200] + " ..."
