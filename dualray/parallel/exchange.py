"""Messages between expert ranks: started, travelling while other work is done, waited for.

On GPUs a message is NCCL's all-to-all, on a stream of its own. On CPUs it is a receive and a send
with every other rank, in this order: gloo's own all-to-all sends first, so that of two ranks that
are not exactly in step the later one says that it can receive only behind its own rows, and both
directions of the link are used one after the other (114 instead of 57 ms for 4 MB at 300 Mbit/s,
a skew of 2 ms is enough). Where other work is done meanwhile, a thread for each group, its courier,
starts these messages, since starting one can take milliseconds.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dualray.parallel.groups import Group, Ways
from dualray.parallel.overlap import Arrival
from dualray.parallel.spans import COMMUNICATION, WAITING, Spans

Meanwhile = Callable[[Arrival | None], None]
"""Does other work until a message is here, or for a while if nobody can say when it is."""


class Exchange:
    """Sends rows over groups, all to all; a worker's dispatches share one."""

    def __init__(self, *, has_couriers: bool = False) -> None:
        """`has_couriers` lets threads of their own send, even if nothing is done meanwhile."""
        self._has_couriers = has_couriers
        self.meanwhile: Meanwhile | None = None
        """Called while a message travels. It may do anything but exchange over the same group.
        None waits at once."""
        self.spans: Spans | None = None
        """Where journeys are noted; None where nobody asks."""
        self.waited_s = 0.0
        """Seconds in which a message was waited for and nothing was computed."""
        self._sent_bytes: dict[Group, Counter[int]] = {}
        self._couriers: dict[Group, ThreadPoolExecutor] = {}

    def __call__(
        self, rows: Tensor, receive: list[int], send: list[int], ways: Ways, name: str
    ) -> Tensor:
        """`send[r]` of the rows to rank r of the group, `receive[r]` from it, in rank order.

        Differentiable: gradients go the same way back. `name` says in timelines what travels.
        """
        return _AllToAll.apply(rows, receive, send, ways, name, self)

    def start_counts(
        self, counts: Tensor, receive: list[int], send: list[int], group: Group
    ) -> Callable[[], Tensor]:
        """Swap int64 counts, `send[r]` of them with rank r; what is returned waits for theirs."""
        theirs = counts.new_empty(sum(receive))
        journey = self._start(theirs, counts, receive, send, group)

        def wait() -> Tensor:
            self._finish(journey, "counts")
            return theirs

        return wait

    def note_wait(self, since: float, name: str = "rows") -> None:
        """Somebody has waited for a message since then (time.perf_counter), without other work."""
        now = time.perf_counter()
        self.waited_s += now - since
        if self.spans is not None:
            self.spans.add(name, WAITING, since, now)

    def sent_bytes(self, ways: Ways) -> Counter[int]:
        """Bytes that went to each other rank over both groups of `ways`, counts of rows included,
        since this exchange was made."""
        sent: Counter[int] = Counter()
        for group in {ways.rows, ways.gradients}:
            sent.update(self._sent_bytes.get(group, {}))
        return sent

    def close(self) -> None:
        """End the couriers, when what they still carry is here or lost."""
        for courier in self._couriers.values():
            courier.shutdown(wait=False, cancel_futures=True)
        self._couriers.clear()

    def swap(
        self, rows: Tensor, receive: list[int], send: list[int], group: Group, name: str
    ) -> Tensor:
        """The same without gradients, over one group."""
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        started = time.perf_counter()
        journey = self._start(out, rows.contiguous(), receive, send, group)
        arrived = self._finish(journey, name)
        if self.spans is not None:
            self.spans.add(name, COMMUNICATION, started, arrived)
        return out

    def _finish(self, journey: _Journey, name: str) -> float:
        """Do other work until a message is here; says when it was."""
        if self.meanwhile is not None:
            self.meanwhile(journey.arrival)
        since = time.perf_counter()
        arrived = journey.wait()
        self.note_wait(since, name)
        return arrived

    def _start(
        self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], group: Group
    ) -> _Journey:
        self._note_sent(rows, send, group)
        if rows.is_cuda:
            work = dist.all_to_all_single(out, rows, receive, send, group=group, async_op=True)
            assert work is not None
            return _Journey(wait=lambda: (work.wait(), time.perf_counter())[1], arrival=None)
        swap = (out.split(receive), rows.detach().split(send), group)
        if self.meanwhile is None and not self._has_couriers:
            return _Journey(wait=lambda: _swap(*swap), arrival=None)
        if group not in self._couriers:
            self._couriers[group] = ThreadPoolExecutor(1, thread_name_prefix="courier")
        arrival = self._couriers[group].submit(_swap, *swap)
        return _Journey(wait=arrival.result, arrival=arrival)

    def _note_sent(self, rows: Tensor, send: list[int], group: Group) -> None:
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        sent = self._sent_bytes.setdefault(group, Counter())
        for rank, count in enumerate(send):
            if count and rank != group.rank():
                sent[rank] += count * row_bytes


@dataclass(frozen=True, kw_only=True)
class _Journey:
    """A message on its way."""

    wait: Callable[[], float]
    """Waits for it and says when it was here; for a GPU, when its stream was told to wait."""
    arrival: Arrival | None


@torch.no_grad()
def _swap(theirs: tuple[Tensor, ...], ours: tuple[Tensor, ...], group: Group) -> float:
    """`ours[r]` to rank r, `theirs[r]` from it; says when all is here."""
    own = group.rank()
    others = [rank for rank in range(group.size()) if rank != own]
    works = [
        dist.irecv(theirs[rank], group=group, group_src=rank)
        for rank in others
        if theirs[rank].numel()
    ]
    works += [
        dist.isend(ours[rank], group=group, group_dst=rank) for rank in others if ours[rank].numel()
    ]
    theirs[own].copy_(ours[own])
    for work in works:
        assert work is not None
        work.wait()
    return time.perf_counter()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        receive: list[int],
        send: list[int],
        ways: Ways,
        name: str,
        exchange: Exchange,
    ) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, ways.gradients
        ctx.name, ctx.exchange = name, exchange
        return exchange.swap(rows, receive, send, ways.rows, name)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        name = f"{ctx.name} gradient"
        dx = ctx.exchange.swap(dy, ctx.send, ctx.receive, ctx.group, name)
        return dx, None, None, None, None, None
