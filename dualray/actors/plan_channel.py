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
            end = _End(rank, self._arrived, self._lost)
            try:
                async with asyncio.timeout(_REACH_WITHIN_S):
                    await loop.create_connection(lambda end=end: end, door.host, door.port)
            except OSError as error:
                self.close()
                reason = str(error) or f"no answer within {_REACH_WITHIN_S:g} s"
                raise RunError(
                    f"worker {rank} cannot be reached at {door.host}:{door.port} ({reason})",
                    hint="let the nodes of a cluster reach each other at every port",
                ) from error
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
        return await self.start(plan)

    def start(self, plan: StepPlan) -> asyncio.Future[list[Any]]:
        """As `run`, but the plan has left when this returns, and what it waits for comes back.

        A task would begin only after all that is due before it: the messages of every stream,
        which for 16 of them held each step up by 4 ms.
        """
        body = pickle.dumps(plan, pickle.HIGHEST_PROTOCOL)
        self._step += 1
        message = _HEADER.pack(len(body), self._step) + body
        self._answers = {}
        self._whole = whole = asyncio.get_running_loop().create_future()
        for end in self._ends:
            if end.is_lost:
                _fail(whole, _lost_worker(end.rank))
                break
            end.write(message)
        return whole

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


class _End(asyncio.Protocol):
    """Cuts what comes from one worker into messages."""

    def __init__(
        self,
        rank: int,
        arrived: Callable[[int, int, bytes], None],
        lost: Callable[[int], None],
    ) -> None:
        self.rank = rank
        self.is_lost = False
        self._arrived, self._lost = arrived, lost
        self._unread = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport  # asyncio sets TCP_NODELAY itself
        # The worker reads every plan before it computes, and has the next one only then.
        ask_whether_there(transport.get_extra_info("socket"), also_what_was_sent=True)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        while len(self._unread) >= _HEADER.size:
            size, step = _HEADER.unpack_from(self._unread)
            end = _HEADER.size + size
            if len(self._unread) < end:
                return
            body = bytes(self._unread[_HEADER.size : end])
            del self._unread[:end]
            self._arrived(self.rank, step, body)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._lost(self.rank)

    def write(self, message: bytes) -> None:
        assert self._transport is not None
        self._transport.write(message)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()  # nothing that waits to be sent matters any more


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
