"""What a request has said so far, as its penalties, its bias and its grammar need it.

Kept by the scheduler beside the request's tokens, so that the workers keep nothing between
steps: a plan carries all that its choices depend on, whichever worker holds the last stage. A
request that adjusts nothing has no history and its plans carry nothing more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from typing import NamedTuple

from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.plan import Adjustment
from dualray.inference.request import SamplingParams
from dualray.inference.token_masks import mask_of, without


class _Said(NamedTuple):
    seen_ids: tuple[int, ...]
    output_counts: tuple[tuple[int, int], ...]


class TokenHistory:
    """Token counts of one request, grown by a token at a time, and its place in its grammar.

    `bad_words` are token ids; the last of a word is banned behind the others.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Iterable[int],
        *,
        grammar: GrammarMatcher | None = None,
        bad_words: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self._params = params
        self._bias = tuple((token, bias) for token, bias in params.logit_bias if bias)
        self._repeats = params.repetition_penalty != 1
        self._counts_output = bool(params.presence_penalty or params.frequency_penalty)
        # A dict keeps the order, so that equal requests send equal plans.
        self._seen: dict[int, None] = dict.fromkeys(prompt_ids) if self._repeats else {}
        self._output: Counter[int] = Counter()
        self._said: _Said | None = None
        """What `_seen` and `_output` hold, once somebody has asked."""
        self._drafts: tuple[int, ...] = ()
        """Tokens behind those, of a history that is `after` another one."""
        self._grammar = grammar
        self._allowed = mask_of(params.allowed_token_ids)
        self._bad_words = [(_packed(word[:-1]), word[-1]) for word in bad_words]
        """What a token must not stand behind, and the token."""
        self._last = b""
        """Of the completion, packed, as many tokens as count for the longest bad word."""
        self._num_kept = max((len(before) for before, _ in self._bad_words), default=0)

    @property
    def is_complete(self) -> bool:
        """The grammar is satisfied and nothing may follow."""
        return self._grammar is not None and self._grammar.is_complete

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on."""
        return None if self._grammar is None else self._grammar.error

    def add(self, token: int) -> None:
        """Notes a chosen token. Not for a history that is `after` another one."""
        assert not self._drafts, "they are not chosen yet"
        self._said = None
        if self._repeats:
            self._seen[token] = None
        if self._counts_output:
            self._output[token] += 1
        self._advance(token)

    def after(self, draft: int) -> TokenHistory:
        """The history with a draft behind it; this one stays as it is.

        The two have in common what was said before, however much it is.
        """
        self._freeze()
        later = copy(self)
        if self._repeats or self._counts_output:
            later._drafts = (*self._drafts, draft)
        if self._grammar is not None:
            later._grammar = self._grammar.copy()
        later._advance(draft)
        return later

    def _advance(self, token: int) -> None:
        """Notes a token where it matters what it stands behind."""
        if self._num_kept:
            self._last = (self._last + _packed((token,)))[-self._num_kept :]
        if self._grammar is not None:
            self._grammar.accept(token)

    def _freeze(self) -> _Said:
        if self._said is None:
            self._said = _Said(tuple(self._seen), tuple(self._output.items()))
        return self._said

    def num_possible(self, drafts: Sequence[int]) -> int:
        """How many of the tokens may come next, one behind the other, as far as the grammar goes.

        A draft that it refuses is never chosen, and nothing can be said of what is behind it.
        """
        return len(drafts) if self._grammar is None else self._grammar.num_possible(drafts)

    def adjustment(self, banned_ids: tuple[int, ...]) -> Adjustment | None:
        """What to change in the logits of the next token; None for nothing.

        Parameters whose tokens have not come up yet are left out: they would change nothing. Bans
        give way where a grammar or `allowed_token_ids` leave nothing else, so that there is always
        a token to choose: those of bad words before `banned_ids`.
        """
        allowed = self._allowed
        if self._grammar is not None:
            allowed = self._grammar.allowed()
            if self._params.ignore_eos:
                # It would be text, and the grammar knows it as the end.
                banned_ids += (self._grammar.eos_id,)
        bad_ends = self._bad_ends()
        if allowed:
            allowed = without(without(allowed, banned_ids), bad_ends)
            banned_ids = ()
        else:
            banned_ids = tuple(dict.fromkeys(banned_ids + bad_ends))
        said = self._freeze()
        if not (banned_ids or allowed or self._bias or any(said) or self._drafts):
            return None
        return Adjustment(
            logit_bias=self._bias,
            repetition_penalty=self._params.repetition_penalty,
            seen_ids=said.seen_ids,
            frequency_penalty=self._params.frequency_penalty,
            presence_penalty=self._params.presence_penalty,
            output_counts=said.output_counts,
            draft_ids=self._drafts,
            banned_ids=banned_ids,
            allowed=allowed,
        )

    def _bad_ends(self) -> tuple[int, ...]:
        """Tokens that would end a bad word."""
        return tuple(last for before, last in self._bad_words if self._last.endswith(before))


def _packed(ids: Iterable[int]) -> bytes:
    """Four bytes each, which are compared much faster than numbers."""
    return b"".join(token.to_bytes(4, "little") for token in ids)
