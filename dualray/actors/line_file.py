"""Lines into a file from a thread of its own, for callers that must not wait for a disk.

The file may be rotated either way: moved away, after which it is made anew, or truncated in place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from dualray.errors import ConfigError

STANDARD_OUTPUT = "-"
MAX_WAITING = 10_000
"""Lines that may wait for the disk; what comes above is lost and counted."""
_MAX_BATCH = 256
_STOP_LIMIT_S = 5.0
_log = logging.getLogger(__name__)


class LineFile:
    """Appends to `path`, made with `mode` if it is not there; `-` is standard output.

    Raises:
        ConfigError: naming `field`, the setting that gave the path: it cannot be written.
    """

    def __init__(self, path: str, field: str, *, mode: int, private: bool = False) -> None:
        """`private` takes others' permissions from a file that is there already."""
        self._path = None if path == STANDARD_OUTPUT else Path(path)
        self._field, self._mode, self._private = field, mode, private
        self._file: int | None = None
        if self._path is not None:
            self._file = self._open(self._path)
        self._lines: queue.Queue[Callable[[], str] | None] = queue.Queue(MAX_WAITING)
        self._num_lost = 0
        self._fails = self._is_behind = False
        self._thread = threading.Thread(target=self._write_all, name=field, daemon=True)
        self._thread.start()

    def add(self, line: Callable[[], str]) -> None:
        """Writes what `line` makes, a line without its end, soon; never waits."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._num_lost += 1

    def stop(self) -> None:
        """Writes what has come and closes; waits for a stuck disk only so long."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=_STOP_LIMIT_S)
        self._thread.join(_STOP_LIMIT_S)

    def _open(self, path: Path) -> int:
        # Without NONBLOCK a pipe that nobody reads would never open.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            file = os.open(path, flags, self._mode)
            kind = os.fstat(file)
            if not stat.S_ISREG(kind.st_mode) and not stat.S_ISCHR(kind.st_mode):
                os.close(file)
                raise OSError(0, "not a plain file")
            if self._private and stat.S_ISREG(kind.st_mode) and kind.st_mode & 0o077:
                os.fchmod(file, self._mode)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._field} is {path} and cannot be written "
                f"({getattr(error, 'strerror', None) or error})",
                hint="make its folder, see to its permissions, or choose another path",
            ) from None
        return file

    def _write_all(self) -> None:
        stopping = False
        while not stopping:
            batch = [self._lines.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < _MAX_BATCH:
                    batch.append(self._lines.get_nowait())
            stopping = None in batch
            made = [self._made(line) for line in batch if line is not None]
            self._write("".join(made).encode(errors="replace"), len(made))
        if self._file is not None:
            os.close(self._file)

    def _made(self, line: Callable[[], str]) -> str:
        try:
            return f"{line()}\n"
        except Exception:  # one line's fault must not end the log
            _log.exception("%s: a line could not be made", self._field)
            return ""

    def _write(self, data: bytes, num_lines: int) -> None:
        try:
            if self._path is None:
                sys.stdout.write(data.decode())
                sys.stdout.flush()
            else:
                self._follow(self._path)
                _write_whole(self._file, data)
            self._fails = False
        except (OSError, ValueError) as error:
            self._num_lost += num_lines
            if not self._fails:  # once, not for every line of a full disk
                _log.warning("%s: lines are lost, %s", self._field, error)
            self._fails = True
            return
        lost, self._num_lost = self._num_lost, 0
        if lost:
            _log.warning("%s: %d lines were lost", self._field, lost)

    def _follow(self, path: Path) -> None:
        """Opens the path anew if the file there is not the one that is open. If that fails the
        lines go on into the old file, which is better than nowhere."""
        assert self._file is not None
        try:
            there = path.stat()
        except OSError:
            there = None
        here = os.fstat(self._file)
        if there is not None and (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino):
            return
        try:
            new = self._open(path)
        except ConfigError as error:
            if not self._is_behind:
                _log.warning("lines go on into the file that was moved away: %s", error)
            self._is_behind = True
            return
        os.close(self._file)
        self._file, self._is_behind = new, False


def _write_whole(file: int | None, data: bytes) -> None:
    assert file is not None
    while data:
        data = data[os.write(file, data) :]
