"""Hidden states and their gradients between pipeline ranks.

Sends never block: what is sent is kept until it has left, which gloo tells only who waits: on CPUs
that is the end of a step, when the executor drains the links. A receive that is posted early lets
its message arrive during other work. Shapes are known on both sides, so no sizes travel.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A message on its way."""

    tensor: Tensor
    work: dist.Work
    arrival: Future[Any] | None
    """Done when it is here; None on a GPU, where only its stream knows."""

    @property
    def is_here(self) -> bool:
        return self.arrival is not None and self.arrival.done()


class PipelineLinks:
    """The point-to-point side of `Groups.channels`."""

    def __init__(
        self, channels: dict[tuple[str, int], Group], pipeline_ranks: tuple[int, ...]
    ) -> None:
        self._channels = channels
        self._ranks = pipeline_ranks
        self._in_flight: deque[tuple[dist.Work, Tensor]] = deque()
        # One for each message that may be awaited at a time: two steps' of a pair each.
        self._watchers = ThreadPoolExecutor(4, thread_name_prefix="watcher")
        self.waited_s = 0.0
        """Seconds spent waiting for others; the executor sets it to 0 before each walk."""

    def send(self, kind: str, direction: int, tensor: Tensor, to: int) -> None:
        """Start sending to pipeline rank `to`."""
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self._ranks[to], group=self._channels[kind, direction])
        assert work is not None
        self._in_flight.append((work, tensor))
        while self._in_flight and self._in_flight[0][0].is_completed():
            self._in_flight.popleft()

    def post(
        self,
        kind: str,
        direction: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: int,
    ) -> Incoming:
        """Make room for the next message of this channel from pipeline rank `source`.

        Messages of a channel fill what was posted in its order.
        """
        tensor = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(tensor, self._ranks[source], group=self._channels[kind, direction])
        assert work is not None
        # gloo says of no receive that it is done before somebody waits for it.
        arrival = None if tensor.is_cuda else self._watchers.submit(work.wait)
        return Incoming(tensor=tensor, work=work, arrival=arrival)

    def receive(
        self,
        kind: str,
        direction: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: int,
    ) -> Tensor:
        """The next message, for whoever has nothing else to do until it is here.

        No other thread watches it, which on busy cores takes longer than a small message.
        """
        tensor = torch.empty(shape, dtype=dtype, device=device)
        work = dist.irecv(tensor, self._ranks[source], group=self._channels[kind, direction])
        assert work is not None
        work.wait()
        return tensor

    def wait(self, incoming: Incoming) -> Tensor:
        """The message, when it is here."""
        started = time.perf_counter()
        if incoming.arrival is None:
            incoming.work.wait()
        else:
            incoming.arrival.result()
        self.waited_s += time.perf_counter() - started
        return incoming.tensor

    def close(self) -> None:
        """End the threads that watch messages, when those that still travel are here or lost."""
        self._watchers.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
