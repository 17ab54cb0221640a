"""Sockets of killed servers are cleared away, and nobody else's."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from dualray.actors.own_socket import OwnSocket, clear_stale


def left_behind(folder: Path, name: str, *, age_s: float = 3600.0, listens: bool = False):
    """A socket of a server that was killed, or that lives if it `listens`."""
    own = folder / name
    own.mkdir()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(own / "grpc"))
    if listens:
        server.listen()
    else:
        server.close()
    changed = (own / "grpc").stat().st_mtime - age_s
    os.utime(own / "grpc", (changed, changed))
    return server


def test_only_sockets_that_nobody_listens_on_go(tmp_path) -> None:
    left_behind(tmp_path, "dualray-dead")
    left_behind(tmp_path, "dualray-young", age_s=0.0)
    left_behind(tmp_path, "other-dead")
    (tmp_path / "dualray-scratch").mkdir()
    (tmp_path / "dualray-scratch" / "grpc").write_text("a file")
    left_behind(tmp_path, "dualray-more")
    (tmp_path / "dualray-more" / "else").write_text("somebody's")
    (tmp_path / "dualray-file").write_text("")
    with left_behind(tmp_path, "dualray-alive", listens=True):
        clear_stale(tmp_path)
        clear_stale(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("dualray-young", "other-dead", "dualray-scratch", "dualray-more", "dualray-file"),
        "dualray-alive",
    }


def test_a_new_one_clears_old_ones_and_itself(tmp_path) -> None:
    left_behind(tmp_path, "dualray-dead")
    own = OwnSocket(tmp_path)
    [folder] = tmp_path.iterdir()
    assert own.path == folder / "grpc"
    assert folder.stat().st_mode & 0o077 == 0
    own.close()
    assert not list(tmp_path.iterdir())
