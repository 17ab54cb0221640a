"""Where a completion is in its grammar, and which tokens it may go on with."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher


class GrammarMatcher:
    """Advances with a completion's tokens; the end-of-sequence token is one of them."""

    def __init__(self, inner: LLMatcher, eos_id: int) -> None:
        self.eos_id = eos_id
        self._inner = inner

    @property
    def is_complete(self) -> bool:
        """The grammar is satisfied and nothing but the end may follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    @property
    def error(self) -> str | None:
        """Why it cannot go on: the grammar asks for more than its limits, or nothing matches."""
        if not self._inner.is_error():
            return None
        lines = self._inner.get_error().splitlines()
        return lines[0] if lines else str(self._inner.stop_reason())

    def allowed(self) -> bytes:
        """Tokens that may come next, packed (`token_masks`), with the end of sequence where the
        grammar may end."""
        return self._inner.compute_bitmask()

    def accept(self, token: int) -> bool:
        """Advances by a token; False, without advancing, where the grammar refuses it."""
        if self.is_complete and token == self.eos_id:
            return True
        return self._inner.try_consume_tokens([token]) == 1

    def num_possible(self, tokens: Sequence[int]) -> int:
        """How many of the tokens it would accept, one behind the other."""
        return 0 if self.is_complete else self._inner.validate_tokens(list(tokens))

    def copy(self) -> GrammarMatcher:
        """One that goes its own way from here, for the same completion: the two share states."""
        return GrammarMatcher(self._inner.deep_copy(), self.eos_id)
