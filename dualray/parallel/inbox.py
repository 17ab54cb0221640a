"""What one rank's steps receive from other stages, and what they send there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualray.parallel.groups import BACKWARD, FORWARD
from dualray.parallel.p2p import Incoming, PipelineLinks
from dualray.parallel.spans import WAITING, Spans
from dualray.schedule.actions import Action, Kind, Schedule, Step, flatten

_Message = tuple[str, int, int]
"""(kind, direction of who receives it, micro-batch)."""


class Inbox:
    """The messages of one walk of `schedule` by `rank`.

    `rows_of(direction, micro_batch)` says how many rows a micro-batch has.
    """

    def __init__(
        self,
        links: PipelineLinks,
        schedule: Schedule,
        rank: int,
        rows_of: Callable[[int, int], int],
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        spans: Spans,
    ) -> None:
        self._links, self._schedule, self._rank = links, schedule, rank
        self._steps = schedule.steps[rank]
        self._rows_of, self._width = rows_of, width
        self._dtype, self._device = dtype, device
        self._spans = spans
        self._num_posted = 0
        self._incoming: dict[_Message, Incoming] = {}
        self._here: dict[_Message, Tensor] = {}
        """Those that are here, from this rank itself too, where a V turns."""

    @property
    def is_empty(self) -> bool:
        return not self._incoming and not self._here

    def source(self, action: Action) -> tuple[int, int] | None:
        """Where an action's input comes from: (rank, direction); None if from no other stage."""
        if action.kind is Kind.WEIGHT_GRAD:
            return None
        forward = action.kind is Kind.FORWARD
        neighbour = self._schedule.upstream if forward else self._schedule.downstream
        return neighbour(self._rank, action.direction)

    def post(self, number: int) -> None:
        """Make room for the messages of the steps up to `number`, in their order."""
        for step in self._steps[self._num_posted : number + 1]:
            self._num_posted += 1
            for message, source in self._messages(step):
                kind, direction, micro_batch = message
                shape = (self._rows_of(direction, micro_batch), self._width)
                self._incoming[message] = self._links.post(
                    kind, direction, shape, self._dtype, self._device, source
                )

    def is_ready(self, number: int) -> bool:
        """Whether waiting for the messages of step `number` would take no time."""
        return all(
            self._incoming[message].is_here for message, _ in self._messages(self._steps[number])
        )

    def wait(self, number: int) -> None:
        """Until the messages of step `number` are here, those of this rank itself excepted."""
        for message, _ in self._messages(self._steps[number]):
            kind, direction, micro_batch = message
            with self._spans.noted(f"input of {kind}{direction}.{micro_batch}", WAITING):
                self._here[message] = self._links.wait(self._incoming.pop(message))

    def take(self, action: Action) -> Tensor:
        """The input of an action; it is here."""
        return self._here.pop(_input_of(action))

    def send(self, kind: str, micro_batch: int, tensor: Tensor, sink: tuple[int, int]) -> None:
        """Let `sink`, (rank, direction), have a forward's output or a backward's gradient."""
        rank, direction = sink
        if rank == self._rank:
            self._here[kind, direction, micro_batch] = tensor.detach()
        else:
            self._links.send(kind, direction, tensor, rank)

    def _messages(self, step: Step) -> list[tuple[_Message, int]]:
        """What a step receives from other ranks, and from which."""
        sources = ((action, self.source(action)) for action in flatten((step,)))
        return [
            (_input_of(action), source[0])
            for action, source in sources
            if source is not None and source[0] != self._rank
        ]


def _input_of(action: Action) -> _Message:
    kind = FORWARD if action.kind is Kind.FORWARD else BACKWARD
    return kind, action.direction, action.micro_batch
