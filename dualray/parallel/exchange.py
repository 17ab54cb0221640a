"""Messages between expert ranks: started, travelling while other work is done, waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.parallel.groups import Group
from dualray.parallel.spans import COMMUNICATION, Spans


class Exchange:
    """Sends rows over a group, all to all.

    `meanwhile` is called while a message travels. It may run anything but another exchange of
    the same group, and by default does nothing.
    """

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] = _nothing
        self.spans: Spans | None = None
        """Where journeys are noted; None where nobody asks."""
        self.waited_s = 0.0
        """Seconds in which a message was waited for and nothing was computed."""

    def __call__(
        self, rows: Tensor, receive: list[int], send: list[int], group: Group, name: str
    ) -> Tensor:
        """`send[r]` of the rows to rank r of the group, `receive[r]` from it, in rank order.

        Differentiable: gradients go the same way back. `name` says in timelines what travels.
        """
        return _AllToAll.apply(rows, receive, send, group, name, self)

    def start_counts(self, counts: Tensor, group: Group) -> Callable[[], Tensor]:
        """Swap int64 counts, equally many with every rank; what is returned waits for theirs."""
        theirs = torch.empty_like(counts)
        work = dist.all_to_all_single(theirs, counts, group=group, async_op=True)
        assert work is not None

        def wait() -> Tensor:
            work.wait()
            return theirs

        return wait

    def _all_to_all(
        self, rows: Tensor, receive: list[int], send: list[int], group: Group, name: str
    ) -> Tensor:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        rows = rows.contiguous()
        started = time.perf_counter()
        work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
        assert work is not None
        arrived: list[float] = []
        if self.spans is not None and not rows.is_cuda:
            # A CUDA future is done when its kernel is queued; there only the wait is known.
            work.get_future().then(lambda _: arrived.append(time.perf_counter()))
        self.meanwhile()
        waits = time.perf_counter()
        work.wait()
        end = time.perf_counter()
        self.waited_s += end - waits
        if self.spans is not None:
            self.spans.add(name, COMMUNICATION, started, arrived[0] if arrived else end)
        return out


def _nothing() -> None:
    pass


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        receive: list[int],
        send: list[int],
        group: Group,
        name: str,
        exchange: Exchange,
    ) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        ctx.name, ctx.exchange = name, exchange
        return exchange._all_to_all(rows, receive, send, group, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        name = f"{ctx.name} gradient"
        dx = ctx.exchange._all_to_all(dy, ctx.send, ctx.receive, ctx.group, name)
        return dx, None, None, None, None, None
