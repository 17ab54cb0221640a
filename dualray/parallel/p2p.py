"""Hidden states and their gradients between pipeline ranks.

Sends never block: they are kept alive until they have left, and the executor drains them
at the end of a step. A receive that is posted early lets its message arrive during other work.
Shapes are known on both sides, so no sizes travel.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.parallel.groups import Group


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A message on its way."""

    tensor: Tensor
    work: dist.Work


class PipelineLinks:
    """The point-to-point side of `Groups.channels`."""

    def __init__(
        self, channels: dict[tuple[str, int], Group], pipeline_ranks: tuple[int, ...]
    ) -> None:
        self._channels = channels
        self._ranks = pipeline_ranks
        self._in_flight: deque[tuple[dist.Work, Tensor]] = deque()
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
        return Incoming(tensor=tensor, work=work)

    def wait(self, incoming: Incoming) -> Tensor:
        """The message, when it is here."""
        started = time.perf_counter()
        incoming.work.wait()
        self.waited_s += time.perf_counter() - started
        return incoming.tensor

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
