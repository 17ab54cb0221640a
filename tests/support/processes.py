"""Real processes for tests of collectives."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
# Importing torch once in the fork server saves seconds per process.
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed"])


def free_port() -> int:
    """A loopback port nobody listens on, to be listened on soon.

    It comes from below the kernel's range for outgoing connections (32768 on Linux) and above Ray's
    (10002 to 19999): what the kernel itself offers may be some connection's own end by then.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _child(function: Callable, rank: int, args: tuple, results: Any) -> None:
    try:
        import torch

        torch.set_num_threads(1)
        results.put((rank, None, function(rank, *args)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        raise SystemExit(1) from None


def run_ranks(function: Callable, world_size: int, *args: Any, timeout_s: float = 120) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` processes; results by rank.

    `function` must be importable; results must pickle without shared memory (numbers, numpy).
    The first failure's traceback fails the test; the other processes are ended.
    """
    results = _CONTEXT.Queue()
    children = [
        _CONTEXT.Process(target=_child, args=(function, rank, args, results), daemon=True)
        for rank in range(world_size)
    ]
    try:
        for child in children:
            child.start()
        by_rank: dict[int, Any] = {}
        while len(by_rank) < world_size:
            rank, error, value = results.get(timeout=timeout_s)
            if error is not None:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            by_rank[rank] = value
        for child in children:
            child.join(timeout=timeout_s)
        return [by_rank[rank] for rank in range(world_size)]
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
        results.close()
