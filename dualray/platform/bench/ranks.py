"""Benchmark processes: one Python a rank, each on the host it is given.

`run_ranks` calls one function in every rank and returns what they return. Ranks are fresh
processes, since a process enters a network namespace best before it has threads. Parent and
rank talk over a socket pair of their own, in pickles by value: printing harms nothing, and what
is printed is shown if a rank dies without a word.

Nobody ends on its own. A rank that has answered, or failed, waits to be killed until all have
answered or one has failed, so that no peer sees a closed connection and reports that instead of
the cause. The kernel kills ranks whose parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from typing import IO, Any

import torch
import torch.distributed as dist

from dualray.errors import DualrayError, RunError
from dualray.parallel.groups import Group, Rendezvous, host_rendezvous
from dualray.platform.bench.hosts import Host

_PYTHON = (
    sys.executable,
    "-u",
    "-P",
    "-c",
    "from dualray.platform.bench.ranks import serve; serve()",
)
"""What is printed is not held back, and the working directory hides no package."""
_PR_SET_PDEATHSIG = 1
_SHOWN_BYTES = 4000
"""How much of the last output of a dead rank an error shows."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """What a rank needs to meet the others; `groups.join` takes the same."""

    rank: int
    world_size: int
    rendezvous: Rendezvous
    hosted: dist.TCPStore | None
    """The store of the rendezvous in rank 0, None in the others."""

    def join_world(self) -> Group:
        """Form a gloo group of all ranks, for what needs no layout."""
        timeout = timedelta(seconds=self.rendezvous.timeout_s)
        store = self.hosted or dist.TCPStore(
            self.rendezvous.host, self.rendezvous.port, is_master=False, timeout=timeout
        )
        dist.init_process_group(
            "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
        )
        assert dist.group.WORLD is not None
        return dist.group.WORLD


def run_ranks(
    function: Callable[[Member, Any], Any],
    args: Any,
    hosts: Sequence[Host],
    *,
    timeout_s: float,
) -> list[Any]:
    """Call `function(member, args)` in one process per entry of `hosts`; the results by rank.

    `function` is found by its module and name; `args` and results are pickled by value. Each
    rank has one torch thread and its gloo on its host's interface. Importing torch and all
    that follows must take less than `timeout_s` seconds, as must each wait of a collective.

    Raises a rank's own DualrayError itself; RunError with its traceback for another exception,
    with its last output if it died, and if time is up.
    """
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(_started(rank, len(hosts), host)) for rank, host in enumerate(hosts)
        ]
        port = _answers(ranks, deadline, timeout_s)[0]
        rendezvous = Rendezvous(host=hosts[0].address, port=port, timeout_s=timeout_s)
        task = pickle.dumps((function.__module__, function.__qualname__, args, rendezvous))
        for rank in ranks:
            rank.connection.send_bytes(task)
        return _answers(ranks, deadline, timeout_s)


@dataclass(frozen=True, kw_only=True)
class _Rank:
    name: str
    process: subprocess.Popen[bytes]
    connection: Connection
    output: IO[bytes]


@contextmanager
def _started(rank: int, world_size: int, host: Host) -> Iterator[_Rank]:
    ours, theirs = Pipe()
    with ours, tempfile.TemporaryFile() as output:
        with theirs:
            numbers = (theirs.fileno(), os.getpid(), rank, world_size)
            process = subprocess.Popen(
                host.command([*_PYTHON, *map(str, numbers), host.address]),
                env=_environment(host),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            name = f"rank {rank} of {world_size}"
            yield _Rank(name=name, process=process, connection=ours, output=output)
        finally:
            process.kill()
            process.wait()


def _environment(host: Host) -> dict[str, str]:
    return {
        **os.environ,
        # Whatever this process can import, as where it was started in a checkout.
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": host.interface,
    }


def _answers(ranks: list[_Rank], deadline: float, timeout_s: float) -> list[Any]:
    """The next answer of every rank."""
    answers: dict[str, Any] = {}
    waiting = {rank.connection: rank for rank in ranks}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            names = ", ".join(rank.name for rank in waiting.values())
            raise RunError(
                f"{names} did not answer within {timeout_s:g} s",
                hint="they may be waiting for each other, or need more time",
            )
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                failure, answers[rank.name] = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                raise _death(rank) from None
            if failure is not None:
                # Who has died without a word is the cause, and its peers fail because of it.
                dead = [other for other in ranks if other.process.poll() is not None]
                raise _death(dead[0]) if dead else _failure(rank, failure)
    return [answers[rank.name] for rank in ranks]


def _failure(rank: _Rank, failure: DualrayError | str) -> DualrayError:
    if isinstance(failure, DualrayError):
        return failure
    last_line = failure.rstrip().splitlines()[-1]
    return RunError(f"{failure}\n{rank.name} failed ({last_line})", hint="its traceback is above")


def _death(rank: _Rank) -> RunError:
    code = rank.process.wait()
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    rank.output.seek(0)
    said = rank.output.read()[-_SHOWN_BYTES:].decode(errors="replace").rstrip()
    shown = f"{said}\n\n" if said else ""
    return RunError(
        f"{shown}{rank.name} ended {how} before it had answered",
        hint="what it printed is above" if said else "it printed nothing",
    )


def serve() -> None:
    """The other side of `run_ranks`: what a rank runs."""
    descriptor, parent, rank, world_size = map(int, sys.argv[1:5])
    _die_with(parent)
    connection = Connection(descriptor)
    torch.set_num_threads(1)
    try:
        hosted, port = None, None
        if rank == 0:
            hosted, rendezvous = host_rendezvous(sys.argv[5])
            port = rendezvous.port
        _answer(connection, None, port)
        module, name, args, rendezvous = pickle.loads(connection.recv_bytes())
        function = getattr(importlib.import_module(module), name)
        member = Member(rank=rank, world_size=world_size, rendezvous=rendezvous, hosted=hosted)
        _answer(connection, None, function(member, args))
    except DualrayError as error:
        _answer(connection, error, None)
    except BaseException:
        _answer(connection, traceback.format_exc(), None)
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()


def _answer(connection: Connection, failure: DualrayError | str | None, value: Any) -> None:
    connection.send_bytes(pickle.dumps((failure, value)))


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        raise SystemExit(1)
