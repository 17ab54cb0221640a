"""Bearer tokens: one a line in a file, several valid at once, read again when the file changes.

A token appears in no sentence and no log, only the number of its line does.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from pathlib import Path

from dualray.actors.watched_files import WatchedFiles, read_named
from dualray.errors import ConfigError

_TOKEN = re.compile(r"[!-~]{1,4096}")  # what a header can carry, within gRPC's 8 KiB of them
_log = logging.getLogger(__name__)


def read_tokens(path: Path, field: str) -> tuple[str, ...]:
    """The tokens of a file, at least one; empty lines and those that start with # are skipped.

    Raises ConfigError naming `field`, the setting or option that gave the path.
    """
    tokens = _parse(path, field)
    if not tokens:
        raise ConfigError(
            f"{field} is {path} and holds no token", hint="write one token a line into it"
        )
    return tokens


class TokenFile:
    """Knows the tokens that are valid now."""

    def __init__(self, path: Path, field: str) -> None:
        """Raises ConfigError if the file has no usable token now."""
        self._path = path
        self._field = field
        self._files = WatchedFiles([path])
        self._files.changed()
        self._digests = _digests(read_tokens(path, field))

    def accepts(self, token: str) -> bool:
        """Whether the token is valid; takes the same time however much of one it resembles.

        An emptied file leaves no token valid; one that cannot be read or parsed leaves all as
        they were, since half of what an administrator meant is worse than what was before.
        """
        if self._files.changed():
            try:
                self._digests = _digests(_parse(self._path, self._field))
            except ConfigError as error:
                _log.warning("tokens stay as they were: %s", error)
        given = _digest(token)
        # No early end: the time must not tell which token came close.
        return sum(hmac.compare_digest(given, valid) for valid in self._digests) > 0


def _digest(token: str) -> bytes:
    """Of one length, so that a comparison does not tell a token's."""
    return hashlib.sha256(token.encode()).digest()


def _digests(tokens: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(_digest(token) for token in tokens)


def _parse(path: Path, field: str) -> tuple[str, ...]:
    text = read_named(path, field).decode("latin-1")  # takes any byte; the pattern judges it
    tokens = []
    for number, line in enumerate(text.split("\n"), start=1):
        token = line.strip(" \t\r")
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                f"{field} is {path} and line {number} of it is no token: visible ASCII characters "
                "without spaces, at most 4096",
                hint="correct the line or start it with #",
            )
        tokens.append(token)
    return tuple(tokens)
