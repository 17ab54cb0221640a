"""Weight gradients as a queue of closures, accumulated into flat fp32 main gradients.

During a `B` the closures run at once, or are held until the backward waits for a message, which
they fill the time of; during an `I` they are put aside as one batch, and a later `W` runs the
oldest batch (arXiv 2401.10241 splits backwards this way). They always run in the order in which
they came, so that sums do not depend on when. Gradients that
autograd itself produces (norms, router) move into `main_grad` by a hook, so that every
parameter has its gradient in one place and `param.grad` stays None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Accumulate = Callable[[Tensor], None]


class WeightGrads:
    """The `WeightGradSink` of one worker."""

    def __init__(self) -> None:
        self._queue: deque[list[tuple[Tensor, Accumulate]]] = deque()
        self._open: list[tuple[Tensor, Accumulate]] | None = None
        self._held: deque[tuple[Tensor, Accumulate]] | None = None

    def submit(self, weight: Tensor, accumulate: Accumulate) -> None:
        if self._open is not None:
            self._open.append((weight, accumulate))
        elif self._held is not None:
            self._held.append((weight, accumulate))
        else:
            _run(weight, accumulate)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Put everything submitted inside aside as one batch at the end of the queue."""
        assert self._open is None, "deferring does not nest"
        self._open = []
        try:
            yield
            self._queue.append(self._open)
        finally:
            self._open = None

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Hold what is submitted inside until `run_held`, and at the latest until the end."""
        assert self._held is None, "holding does not nest"
        self._held = deque()
        try:
            yield
            while self.run_held():
                pass
        finally:
            self._held = None

    def run_held(self) -> bool:
        """Do the first weight gradient that a backward holds; False if there is none."""
        if not self._held:
            return False
        _run(*self._held.popleft())
        return True

    def run_oldest(self) -> None:
        """Do the weight gradients that have waited longest."""
        for weight, accumulate in self._queue.popleft():
            _run(weight, accumulate)

    def __len__(self) -> int:
        return len(self._queue)


@torch.no_grad()
def _run(weight: Tensor, accumulate: Accumulate) -> None:
    accumulate(weight.main_grad)  # pyrefly: ignore[missing-attribute]


def attach_main_grads(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Give each parameter a zeroed `main_grad` view of one flat buffer, and return the buffer.

    fp32, or float64 for float64 parameters. Gradients of autograd are moved there as soon
    as they are complete.
    """
    parameters = list(parameters)
    dtype = torch.promote_types(parameters[0].dtype, torch.float32) if parameters else torch.float32
    flat = torch.zeros(
        sum(p.numel() for p in parameters),
        dtype=dtype,
        device=parameters[0].device if parameters else None,
    )
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.main_grad = flat[start:end].view_as(parameter)  # pyrefly: ignore
        parameter.register_post_accumulate_grad_hook(_move_grad)
        start = end
    return flat


def _move_grad(parameter: Tensor) -> None:
    if parameter.grad is None:  # its functions hand their gradient to the sink instead
        return
    parameter.main_grad.add_(parameter.grad)  # pyrefly: ignore[missing-attribute]
    parameter.grad = None
