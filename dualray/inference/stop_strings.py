"""How much of a stop string the text ends with, which is what must be held back."""

from __future__ import annotations


class Beginning:
    """The longest beginning of a string, but the whole, that a growing text ends with.

    Knuth's, Morris' and Pratt's automaton (doi 10.1137/0206024): a character costs the same however
    long the string is. Its table grows no longer than what has been found of the string.
    """

    def __init__(self, whole: str) -> None:
        self._whole = whole
        self._falls = [0]
        """By length - 1 of a beginning, length of the longest shorter one that it ends with."""
        self.length = 0

    def add(self, fresh: str) -> None:
        """Text that does not make the string whole."""
        whole = self._whole
        if len(whole) == 1 or (not self.length and whole[0] not in fresh):
            return
        for character in fresh:
            self.length = self._next(self.length, character)
            if self.length == len(self._falls) + 1:
                last = whole[self.length - 1]
                self._falls.append(self._next(self._falls[-1], last))

    def forget(self) -> None:
        """The text begins anew."""
        self.length = 0

    def _next(self, length: int, character: str) -> int:
        while length and self._whole[length] != character:
            length = self._falls[length - 1]
        return length + (self._whole[length] == character)
