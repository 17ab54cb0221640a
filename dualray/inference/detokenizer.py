"""Token ids to text, piece by piece, and stop strings that cross token borders.

Two things must never reach a caller: half a UTF-8 character, and the beginning of a stop
string that is completed by a later token. Both are held back until it is clear what they
are. Inference knows no tokenizer; it takes whatever satisfies `Detokenizer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from dualray.inference.stop_strings import Beginning

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
    the prompt's last. `encode` tells a final U+FFFD that was said from half a character; without it
    both are dropped.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        encode: Callable[[str], Sequence[int]] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._encode = encode
        self._stop = tuple(stop)
        self._begun = [Beginning(one) for one in self._stop]
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
        rest = self.take_held() + self._last_said()
        self._pending, self._given = [], 0
        return rest

    def take_held(self) -> str:
        """What may be the beginning of a stop string, without a look at the tokenizer."""
        held, self._held = self._held, ""
        return held

    def _last_said(self) -> str:
        """What of the pending ids' text is no half character but U+FFFD itself."""
        for end in range(len(self._pending), 0, -1):
            if self._says_replacement(self._pending[:end]):
                return self._text_behind(self._context, self._pending[:end])[self._given :]
        return ""

    def _says_replacement(self, ids: list[int]) -> bool:
        """Whether some last ids are what U+FFFD is written with, as bytes of anything else are not.

        It has three bytes, and a tokenizer may join it with what is before.
        """
        if self._encode is None:
            return False
        for count in range(1, min(len(ids), _MOST_HALF + 1) + 1):
            last = ids[-count:]
            text = self._decode(last)
            if text.endswith(REPLACEMENT):
                again = list(self._encode(text))
                # Some tokenizers put a mark before a text, which stands for nothing.
                if again[-count:] == last and not self._decode(again[:-count]):
                    return True
        return False

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
            for begun in self._begun:
                begun.forget()
            return text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            # The earliest match ends the text; of several there, the longest.
            at, stop = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            self.matched_stop, self._held = stop, ""
            return text[: at + len(stop)] if self._include_stop else text[:at]
        for begun in self._begun:
            begun.add(fresh)
        keep = max((begun.length for begun in self._begun), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _settled(text: str) -> str:
    """All but up to three final U+FFFD."""
    least = max(0, len(text) - _MOST_HALF)
    return text[: max(least, len(text.rstrip(REPLACEMENT)))]
