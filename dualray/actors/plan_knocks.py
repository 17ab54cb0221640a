"""Who of all that come to a worker's port knows its secret, and whether that one is still there.

Whoever reaches the port can connect to it: scanners, probes, strangers. All are listened to side by
side, so that one who says nothing, or a byte a second, holds up nobody.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

_WITHIN_S = 5.0
"""From connecting to the end of the secret, however it comes."""
_MOST = 64
"""Connections without a secret yet; a further one takes the place of the oldest."""
_TRY_AGAIN_S = 0.1
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))
"""Seconds of silence before the first question, seconds between two, and how many go unanswered."""
_UNANSWERED_MS = 30_000


@dataclass
class _Knock:
    until: float
    said: bytearray = field(default_factory=bytearray)


def first_with_secret(
    listening: socket.socket, secret: bytes, closed: threading.Event
) -> socket.socket | None:
    """The first connection that begins with `secret`, of which nothing more has been read.

    Returns None once `closed` is set and `listening` shut down, in this order. All other
    connections are closed.
    """
    knocks: dict[socket.socket, _Knock] = {}  # the oldest first
    listening.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)

        def forget(connection: socket.socket) -> None:
            selector.unregister(connection)
            del knocks[connection]

        try:
            while True:
                for key, _ in selector.select(_time_left(knocks)):
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    if found is listening:
                        if closed.is_set():
                            return None
                        if (connection := _accepted(listening, closed)) is None:
                            continue
                        if len(knocks) == _MOST:
                            oldest = next(iter(knocks))
                            forget(oldest)
                            oldest.close()
                        knocks[connection] = _Knock(time.monotonic() + _WITHIN_S)
                        selector.register(connection, selectors.EVENT_READ)
                    elif found in knocks and _has_ended(found, knocks[found], len(secret)):
                        said = bytes(knocks[found].said)
                        forget(found)
                        if hmac.compare_digest(said, secret):
                            found.setblocking(True)
                            return found
                        found.close()
                now = time.monotonic()
                for late in [each for each, knock in knocks.items() if knock.until <= now]:
                    forget(late)
                    late.close()
        finally:
            for connection in knocks:
                connection.close()


def ask_whether_there(connection: socket.socket, *, also_what_was_sent: bool = False) -> None:
    """Ends the connection 30 s after the other side's machine or the way to it has vanished.

    Nobody says so then, and without this the kernel waits for two hours. It is the other kernel
    that answers, so that a process may compute or stand still for as long as it likes.

    With `also_what_was_sent` what the other side does not take counts too, its process included;
    for who sends only while the other side reads.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = list(_KEEPALIVE)
    if also_what_was_sent:  # the kernel asks nothing while it waits for an acknowledgement
        options.append(("TCP_USER_TIMEOUT", _UNANSWERED_MS))
    for name, value in options:
        if hasattr(socket, name):  # not every system has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _time_left(knocks: dict[socket.socket, _Knock]) -> float | None:
    oldest = next(iter(knocks.values()), None)
    return None if oldest is None else max(0.0, oldest.until - time.monotonic())


def _accepted(listening: socket.socket, closed: threading.Event) -> socket.socket | None:
    try:
        connection, _ = listening.accept()
    except OSError as error:
        if not isinstance(error, (BlockingIOError, ConnectionAbortedError)):
            closed.wait(_TRY_AGAIN_S)  # no file is left to open; who knocks waits outside
        return None
    connection.setblocking(False)
    return connection


def _has_ended(connection: socket.socket, knock: _Knock, size: int) -> bool:
    """Whether it has said as much as the secret has, or says nothing more."""
    try:
        part = connection.recv(size - len(knock.said))
    except BlockingIOError:
        return False
    except OSError:
        part = b""
    knock.said += part
    return not part or len(knock.said) == size
