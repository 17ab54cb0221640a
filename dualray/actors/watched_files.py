"""Files that are read again when they change, so that what they hold rotates without a restart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from dualray.errors import ConfigError

_SETTLED_NS = 2_000_000_000
"""A file younger than this may change again within one tick of the file system's clock, at the
same size, which no stamp shows."""

_Stamp = tuple[int, int, int]
_MISSING: _Stamp = (0, 0, 0)


class WatchedFiles:
    """Says whether files changed since it was last asked; a look costs one `stat` a file."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._seen: tuple[_Stamp, ...] | None = None

    def changed(self) -> bool:
        """True at first, then after a change. Read the files after it, not before."""
        stamps = tuple(_stamp(path) for path in self._paths)
        if stamps == self._seen:
            return False
        now = time.time_ns()
        settled = all(abs(now - modified) > _SETTLED_NS for modified, _, _ in stamps)
        self._seen = stamps if settled else None
        return True


def read_named(path: Path, field: str) -> bytes:
    """A file's bytes. Raises ConfigError naming `field`, which gave the path."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{field} is {path} and cannot be read ({reason})",
            hint="check the path and its permissions",
        ) from None


def _stamp(path: Path) -> _Stamp:
    """Of the file behind a link: Kubernetes rotates a mounted secret by moving links."""
    try:
        status = path.stat()
    except OSError:
        return _MISSING
    return status.st_mtime_ns, status.st_size, status.st_ino
