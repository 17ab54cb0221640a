"""Step plans from the engine to its workers, and what they chose back: a connection beside Ray.

Ray carries control everywhere else. But a step of a small model takes a few milliseconds, and four
actor calls and their answers took 4.4 of them with a plan of 16 sequences (2.5 with nothing in
them: 0.5 of processor time a call in the engine alone). Here the same plan takes 0.9. Both on two
cores of an AMD EPYC, from the engine's call until the last worker began, and from the last one's
end.

A worker opens a `PlanDoor`, a thread that runs the plans of one engine, one after another. The
engine learns through Ray where it is, and the secret with which whoever knocks must begin; behind
it both sides are of one run and trust each other's pickles, as Ray's do. An engine that has gone
closes the door, and a worker whose node has vanished is lost after half a minute. Ray's other
calls to a worker stay possible; those that use its process groups are made between steps, as a
group must be issued from one thread at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import secrets
import socket
import struct
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualray.actors.error_words import error_words
from dualray.actors.plan_knocks import ask_whether_there, first_with_secret
from dualray.errors import RunError
from dualray.inference.plan import StepPlan

_HEADER = struct.Struct("<IQ")
"""Bytes of the body, and the step."""
_READ_BYTES = 1 << 18
_REACH_WITHIN_S = 30.0
_REASON_WITHIN_S = 0.5
"""When a worker dies its peers fail too, with a closed connection; the death is the news."""


@dataclass(frozen=True, kw_only=True)
class Door:
    """Where a worker takes plans."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class PlanDoor:
    """The worker's side. `run` is called with every plan, on one thread of this object.

    `prepare` is called once before, for settings that a thread has for itself.
    """

    def __init__(
        self,
        host: str,
        run: Callable[[StepPlan], Any],
        *,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._prepare = run, prepare
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self._connection: socket.socket | None = None
        self._closing = threading.Lock()
        self._closed = threading.Event()
        port = self._listening.getsockname()[1]
        self.at = Door(host=host, port=port, secret=secrets.token_bytes(32))
        self._thread = threading.Thread(target=self._serve, name="plans", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Refuses further plans; a step that is under way ends, and is answered, first."""
        with self._closing:
            self._closed.set()
            # Closing alone would not wake a thread that waits.
            _shut_down(self._listening, socket.SHUT_RDWR)
            if self._connection is not None:
                _shut_down(self._connection, socket.SHUT_RD)
        self._thread.join()

    def _serve(self) -> None:
        self._prepare()
        with self._listening:
            engine = first_with_secret(self._listening, self.at.secret, self._closed)
        if engine is None:
            return
        with engine:
            with self._closing:
                if self._closed.is_set():
                    return
                self._connection = engine
            engine.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask_whether_there(engine)
            self._answer(engine)

    def _answer(self, connection: socket.socket) -> None:
        """Until the engine goes, or the door is closed."""
        try:
            while True:
                size, step = _HEADER.unpack(_read(connection, _HEADER.size))
                plan = pickle.loads(_read(connection, size))
                try:
                    body = pickle.dumps((None, self._run(plan)), pickle.HIGHEST_PROTOCOL)
                except Exception as error:
                    traceback.print_exc()  # into the worker's log
                    body = pickle.dumps((error_words(error), None))
                connection.sendall(_HEADER.pack(len(body), step) + body)
        except OSError:
            return


class PlanChannels:
    """The engine's side: one connection to each of some workers with neighbouring ranks.

    Use from one event loop.
    """

    def __init__(self, first_rank: int = 0) -> None:
        self._first_rank = first_rank
        self._ends: list[_End] = []
        self._step = 0
        self._answers: dict[int, Any] = {}
        self._whole: asyncio.Future[list[Any]] | None = None

    async def open(self, doors: Sequence[Door]) -> None:
        """Connects to the workers' doors, by rank.

        Raises:
            RunError: a worker cannot be reached.
        """
        loop = asyncio.get_running_loop()
        for rank, door in enumerate(doors, start=self._first_rank):
            connection = socket.socket(socket.AF_INET6 if ":" in door.host else socket.AF_INET)
            connection.setblocking(False)
            try:
                async with asyncio.timeout(_REACH_WITHIN_S):
                    await loop.sock_connect(connection, (door.host, door.port))
            except OSError as error:
                connection.close()
                self.close()
                reason = str(error) or f"no answer within {_REACH_WITHIN_S:g} s"
                raise RunError(
                    f"worker {rank} cannot be reached at {door.host}:{door.port} ({reason})",
                    hint="let the nodes of a cluster reach each other at every port",
                ) from error
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The worker reads every plan before it computes, and has the next one only then.
            ask_whether_there(connection, also_what_was_sent=True)
            end = _End(rank, connection, loop, self._arrived, self._lost)
            end.write(door.secret)
            self._ends.append(end)

    def close(self) -> None:
        """Workers run no more plans of this engine."""
        for end in self._ends:
            end.close()
        self._ends.clear()

    async def run(self, plan: StepPlan) -> list[Any]:
        """What each worker's `run` returned for the plan, by rank.

        Raises:
            RunError: a worker is lost or has failed; the others may still compute.
        """
        body = pickle.dumps(plan, pickle.HIGHEST_PROTOCOL)
        self._step += 1
        message = _HEADER.pack(len(body), self._step) + body
        self._answers = {}
        self._whole = whole = asyncio.get_running_loop().create_future()
        for end in self._ends:
            if end.is_lost:
                raise _lost_worker(end.rank)
            end.write(message)
        return await whole

    def _arrived(self, rank: int, step: int, body: bytes) -> None:
        if step != self._step or self._whole is None or self._whole.done():
            return  # of a step that nobody waits for any more
        failure, result = pickle.loads(body)
        if failure is not None:
            error = RunError(f"worker {rank} failed with {failure}", hint="see its log")
            loop = asyncio.get_running_loop()
            loop.call_later(_REASON_WITHIN_S, _fail, self._whole, error)
            return
        self._answers[rank] = result
        if len(self._answers) == len(self._ends):
            self._whole.set_result([self._answers[end.rank] for end in self._ends])

    def _lost(self, rank: int) -> None:
        if self._whole is not None:
            _fail(self._whole, _lost_worker(rank))


class _End:
    """One worker's connection, and what comes through it cut into messages.

    No asyncio transport: the loop that Ray gives an actor sends what is written to one after all
    callbacks that are due, which with many streams to feed began every step 4 ms later.
    """

    def __init__(
        self,
        rank: int,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        arrived: Callable[[int, int, bytes], None],
        lost: Callable[[int], None],
    ) -> None:
        self.rank = rank
        self.is_lost = False
        self._connection, self._loop = connection, loop
        self._arrived, self._lost = arrived, lost
        self._unread, self._unsent = bytearray(), bytearray()
        loop.add_reader(connection.fileno(), self._read)

    def write(self, message: bytes) -> None:
        """Sends now what the kernel takes now, which is all of a small message."""
        self._unsent += message
        if len(self._unsent) == len(message):
            self._send()

    def close(self) -> None:
        if self._connection.fileno() >= 0:
            self._loop.remove_reader(self._connection.fileno())
            self._loop.remove_writer(self._connection.fileno())
            self._connection.close()

    def _send(self) -> None:
        try:
            sent = self._connection.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._end()
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._connection.fileno(), self._send)
        else:
            self._loop.remove_writer(self._connection.fileno())

    def _read(self) -> None:
        try:
            data = self._connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        self._unread += data
        while len(self._unread) >= _HEADER.size:
            size, step = _HEADER.unpack_from(self._unread)
            end = _HEADER.size + size
            if len(self._unread) < end:
                return
            body = bytes(self._unread[_HEADER.size : end])
            del self._unread[:end]
            self._arrived(self.rank, step, body)

    def _end(self) -> None:
        self.is_lost = True
        self.close()
        self._lost(self.rank)


def _fail(whole: asyncio.Future[list[Any]], error: RunError) -> None:
    if not whole.done():
        whole.set_exception(error)


def _lost_worker(rank: int) -> RunError:
    return RunError(f"worker {rank} is lost", hint="see its log")


def _read(connection: socket.socket, size: int) -> bytes:
    """Raises ConnectionError where the other side ends before."""
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise ConnectionError("the other side is gone")
        parts += part
    return bytes(parts)


def _shut_down(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # where the other side has gone before
        connection.shutdown(how)
