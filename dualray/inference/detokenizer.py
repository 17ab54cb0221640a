"""Token ids to text, piece by piece, and stop strings that cross token borders.

Two things must never reach a caller: half a UTF-8 character, and the beginning of a stop
string that is completed by a later token. Both are held back until it is clear what they
are. Inference knows no tokenizer; it takes whatever satisfies `Detokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

_MOST_HALF = 3
"""Bytes that a UTF-8 character may lack its last of: a decoder makes one U+FFFD of them all, or one
of each."""

_MOST_PENDING = 24
"""Ids after which the first half is settled, so that the work for an id stays the same."""


class Detokenizer(Protocol):
    """What text assembly needs of a tokenizer."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        ...


class IncrementalText:
    """Assembles one completion's text.

    Text before up to three final U+FFFD, which may become a character yet, never changes when more
    ids come. Ids that gave settled text stay as context for the next piece, because some
    tokenizers decode an id differently at the beginning of a text: at first those are `context`,
    the prompt's last.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skips = skip_special_tokens
        self._context: list[int] = list(context)
        if self._decode(self._context).endswith(REPLACEMENT):
            self._context = []  # half a character of the prompt is no text to go on from
        self._pending: list[int] = []
        self._given = 0  # characters of the pending ids' text that are in _held already
        self._held = ""  # settled text that may be the beginning of a stop string
        self.matched_stop: str | None = None

    def push(self, token_id: int, *, check_stop: bool = True) -> str:
        """Takes one id and returns the text that may be shown now; "" if none may yet.

        After a stop string has matched, `matched_stop` is set and nothing more comes.
        """
        assert self.matched_stop is None
        self._pending.append(token_id)
        text = self._text_behind(self._context, self._pending)
        settled = _settled(text)
        fresh = settled[self._given :]
        self._given = max(self._given, len(settled))
        if settled == text and text:
            self._context, self._pending, self._given = self._pending, [], 0
        elif len(self._pending) > _MOST_PENDING:
            self._settle_first(text)
        return self._show(fresh, check_stop)

    def finish(self) -> str:
        """The rest that was held back; a character that never became whole is dropped."""
        if self.matched_stop is not None:
            return ""
        rest, self._held = self._held, ""
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._detokenizer.decode(ids, skip_special_tokens=self._skips)

    def _text_behind(self, context: list[int], ids: list[int]) -> str:
        """Text that the ids add to the context's."""
        before, whole = self._decode(context), self._decode(context + ids)
        # A run of byte tokens with one that is wrong becomes U+FFFD as a whole.
        return whole[len(before) :] if whole.startswith(before) else self._decode(ids)

    def _settle_first(self, text: str) -> None:
        """Makes context of the first pending ids, if their text has been given.

        The last half is more than what three U+FFFD can be made of.
        """
        half = _MOST_PENDING // 2
        first, last = self._pending[:-half], self._pending[-half:]
        known = self._text_behind(self._context, first)
        if len(known) <= self._given and text.startswith(known):
            self._context, self._pending = first, last
            self._given -= len(known)

    def _show(self, fresh: str, check_stop: bool) -> str:
        text = self._held + fresh
        if not check_stop:
            self._held = ""
            return text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The earliest match ends the text; of several there, the longest.
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self.matched_stop, self._held = stop, ""
            return text[: at + len(stop)] if self._include_stop else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


def _settled(text: str) -> str:
    """All but up to three final U+FFFD."""
    least = max(0, len(text) - _MOST_HALF)
    return text[: max(least, len(text.rstrip(REPLACEMENT)))]
