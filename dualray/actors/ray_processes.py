"""Ray and signals, and its processes: apart from the terminal's, and gone at the end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
from ray._private import services, utils

_END_LIMIT_S = 5.0


@contextlib.contextmanager
def apart_from_signals() -> Iterator[list[int]]:
    """Ray's processes, which are started inside, get process groups of their own.

    A signal to this process's group (`timeout`, a service manager) is meant for the run, which
    needs its Ray to end in order. The kernel ends Ray's processes if this one dies. Yields the
    list of their ids; all others descend from them.
    """
    real = services.ConsolePopen
    pids: list[int] = []

    def start(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = real(*args, **options, process_group=0)
        pids.append(process.pid)
        return process

    # pyrefly: ignore [bad-assignment]
    services.ConsolePopen = start
    try:
        yield pids
    finally:
        services.ConsolePopen = real


@contextlib.contextmanager
def keep_sigterm() -> Iterator[None]:
    """This process's handler of SIGTERM stays: `ray.init` inside takes it, in Python and in C++."""
    handler = signal.getsignal(signal.SIGTERM)
    real = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda sigterm_handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = real
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and all that descend from them; ask before they end."""
    members: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            members += [process, *process.children(recursive=True)]
    return members


def await_end(members: list[psutil.Process], *, limit_s: float = _END_LIMIT_S) -> None:
    """Wait until these have ended; what has not by then is killed."""
    _, left = psutil.wait_procs(members, timeout=limit_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=_END_LIMIT_S)
