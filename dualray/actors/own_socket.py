"""The Unix socket on which a secured server's own run reaches it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

# In /tmp and nowhere else: a socket's path may have 107 bytes.
_FOLDER, _PREFIX, _NAME = Path("/tmp"), "dualray-", "grpc"
_OLD_S = 60.0
"""A younger socket may be about to be listened on."""


class OwnSocket:
    """A place that only this user can reach. What killed servers have left is cleared away."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        clear_stale(folder)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))  # of mode 0700
        self.path = self._folder / _NAME

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def clear_stale(folder: Path = _FOLDER) -> None:
    """Remove this user's sockets that nobody listens on any more.

    A process that is killed leaves its own behind. Whether it lives is asked of the socket and
    not of a process id, which another container may see otherwise.
    """
    for found in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or somebody else's
            if os.listdir(found) == [_NAME] and _is_stale(found / _NAME):
                shutil.rmtree(found)


def _is_stale(path: Path) -> bool:
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        return False
    if time.time() - found.st_mtime < _OLD_S:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
