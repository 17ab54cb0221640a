"""What one worker's expert groups did: rows in every slot, seconds in every layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualray.model.moe import Experts


@dataclass(frozen=True, kw_only=True)
class ExpertWork:
    """Between two readings of the meter, by layer."""

    slot_rows: dict[int, list[int]]
    """Rows that each slot of this worker was sent."""
    seconds: dict[int, float]
    """In forwards of the routed experts."""


class ExpertMeter:
    """Counts rows and seconds between `begin` and `take`.

    `rows` is written by dispatches, which see the counts anyway.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Tensor] = {}
        self._is_timing = False
        self._seconds: dict[int, float] = {}
        self._events: list[tuple[int, Any, Any]] = []
        self._began: Any = None

    def watch(self, experts: Mapping[int, Experts]) -> None:
        """Time the forwards of these modules; once for each."""
        for layer, module in experts.items():
            module.register_forward_pre_hook(lambda _, args: self._begin(args[0]))
            module.register_forward_hook(lambda _, args, out, layer=layer: self._end(layer, out))

    def begin(self) -> None:
        """Count from here on."""
        self.rows.clear()
        self._seconds.clear()
        self._events.clear()
        self._is_timing = True

    def take(self) -> ExpertWork:
        """What was done since it began. Waits for a GPU. Nothing is timed from here on."""
        for layer, began, ended in self._events:
            ended.synchronize()
            took_s = began.elapsed_time(ended) / 1e3
            self._seconds[layer] = self._seconds.get(layer, 0.0) + took_s
        work = ExpertWork(
            slot_rows={layer: rows.tolist() for layer, rows in sorted(self.rows.items())},
            seconds=dict(sorted(self._seconds.items())),
        )
        self._is_timing = False
        return work

    def take_rows(self) -> ExpertWork:
        """Rows since they were last taken, or it began, and no seconds; it goes on as it was."""
        rows = {layer: counts.tolist() for layer, counts in sorted(self.rows.items())}
        self.rows.clear()
        return ExpertWork(slot_rows=rows, seconds={})

    # A forward of experts exchanges nothing, so no other forward begins before it ends.
    def _begin(self, rows_ND: Tensor) -> None:
        if self._is_off():
            return
        self._began = _event() if rows_ND.is_cuda else time.perf_counter()

    def _end(self, layer: int, out_ND: Tensor) -> None:
        if self._is_off():
            return
        if out_ND.is_cuda:
            self._events.append((layer, self._began, _event()))
        else:
            took_s = time.perf_counter() - self._began
            self._seconds[layer] = self._seconds.get(layer, 0.0) + took_s

    def _is_off(self) -> bool:
        # What is compiled has no clock to read.
        return torch.compiler.is_compiling() or not self._is_timing


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
