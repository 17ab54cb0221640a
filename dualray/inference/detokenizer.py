"""Token ids to text, piece by piece, and stop strings that cross token borders.

Two things must never reach a caller: half a UTF-8 character, and the beginning of a stop
string that is completed by a later token. Both are held back until it is clear what they
are. Inference knows no tokenizer; it takes whatever satisfies `Detokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """What text assembly needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        ...


class IncrementalText:
    """Assembles one completion's text.

    A decoder replaces a character cut off at the end by exactly one U+FFFD, so the text
    before a final U+FFFD never changes when more ids come. Ids that gave settled text stay
    as context for the next piece, because some tokenizers decode an id differently at the
    beginning of a text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._context: list[int] = []
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
        text = self._pending_text()
        settled = text[:-1] if text.endswith(REPLACEMENT) else text
        fresh = settled[self._given :]
        self._given = len(settled)
        if settled == text and text:
            self._context, self._pending, self._given = self._pending, [], 0
        return self._show(fresh, check_stop)

    def finish(self) -> str:
        """The rest that was held back; a character that never became whole is dropped."""
        if self.matched_stop is not None:
            return ""
        rest, self._held = self._held, ""
        return rest

    def _pending_text(self) -> str:
        """Text that the pending ids add to the context's."""
        if not self._context:
            return self._detokenizer.decode(self._pending)
        before = self._detokenizer.decode(self._context)
        return self._detokenizer.decode(self._context + self._pending)[len(before) :]

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
