"""How evenly requests load the expert ranks, as a metric.

The slowest expert rank of a layer determines its time. Between two of the engine's steps, and now
and then only, the workers are asked how many rows their experts were sent: dispatches count them
anyway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dualray.parallel.expert_meter import ExpertWork
from dualray.parallel.layout import Layout
from dualray.parallel.rebalancing import rank_imbalance

EVERY_S = 10.0
"""Seconds between looks: about what Prometheus waits between scrapes."""
_log = logging.getLogger(__name__)


def balancedness(layout: Layout, works: Sequence[ExpertWork]) -> dict[int, float]:
    """By layer: rows of the expert ranks' mean over those of the fullest; 1.0 is balance.

    By world rank in `works`. A layer that ran no row is left out.
    """
    return {layer: 1 / most for layer, most in rank_imbalance(layout, works).items()}


class ExpertLoads:
    """Asks the workers, handles of all by rank, and shows what they said."""

    def __init__(
        self,
        layout: Layout,
        workers: Sequence[Any],
        show: Callable[[Mapping[int, float]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._workers, self._show = layout, tuple(workers), show
        self._clock = clock
        self._looked_s: float | None = None

    async def before_step(self) -> None:
        """A step is to come. The first look shows nothing: what it finds was training's."""
        now_s = self._clock()
        if self._looked_s is not None and now_s - self._looked_s < EVERY_S:
            return
        is_first, self._looked_s = self._looked_s is None, now_s
        try:
            works = await asyncio.gather(*(w.expert_rows.remote() for w in self._workers))
        except Exception as error:  # of a metric; who runs the next step says what is lost
            _log.warning("the experts' loads are not known: %s", error)
            return
        if not is_first:
            self.saw(works)

    def saw(self, works: Sequence[ExpertWork]) -> None:
        """Shows what somebody else has asked for."""
        self._show(balancedness(self._layout, works))
