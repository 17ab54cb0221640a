"""Hidden states and their gradients between pipeline ranks.

Sends never block: they are kept alive until they have left, and the executor drains them
at the end of a step. Shapes are static, so no sizes travel.
"""

from __future__ import annotations

import time
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from dualray.parallel.groups import Group


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

    def receive(
        self,
        kind: str,
        direction: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        source: int,
    ) -> Tensor:
        """Wait for the next message of this channel from pipeline rank `source`."""
        tensor = torch.empty(shape, dtype=dtype, device=device)
        started = time.perf_counter()
        work = dist.irecv(tensor, self._ranks[source], group=self._channels[kind, direction])
        assert work is not None
        work.wait()
        self.waited_s += time.perf_counter() - started
        return tensor

    def drain(self) -> None:
        """Wait until everything sent has left."""
        while self._in_flight:
            self._in_flight.popleft()[0].wait()
