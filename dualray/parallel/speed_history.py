"""What expert ranks were measured to do, step by step and placement by placement, and how fast
that makes them.

A placement that changes gives every rank other rows, which tells an overhead better than anything
else does. So a mean is kept of what was measured under each of the last placements; rows and
seconds of any steps lie on one line with those means. R expert ranks, L layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from dualray.errors import RunError
from dualray.parallel.speed_fit import RankTimes, fit_speeds

RECENT = 16
"""Steps, or windows of a serving engine's steps, whose measurements are kept one by one."""
FORMER = 8
"""Placements of which a mean is kept."""
ALIKE = 0.1
"""Placements that give no rank rows that differ by more, relative, count as one, so that many
small moves do not push out what the large ones have shown."""


class SpeedHistory:
    """Bounded, and plain data."""

    def __init__(self) -> None:
        self._recent = deque[RankTimes](maxlen=RECENT)
        self._former: list[RankTimes] = []

    def observe(self, times: RankTimes) -> None:
        """Take in one step. `checked` says what it may be."""
        self._recent.append(times)

    def moved(self) -> None:
        """From now on experts are elsewhere."""
        if not self._recent:
            return
        latest = _mean(self._recent)
        self._recent.clear()
        others = [each for each in self._former if _difference(each, latest) > ALIKE]
        self._former = [*others, latest]
        if len(self._former) > FORMER:
            del self._former[_most_alike(self._former)]

    def rows_per_s(self) -> list[float | None]:
        """Of every expert rank, as `fit_speeds` says; no ranks if nothing was measured."""
        return fit_speeds(self._recent, self._former) if self._recent else []


def checked(times: RankTimes) -> RankTimes:
    """Raises RunError for seconds that are negative, infinite or no numbers."""
    bad_LR = ~(np.isfinite(times.seconds_LR) & (times.seconds_LR >= 0))
    if bad_LR.any():
        layer, rank = np.argwhere(bad_LR)[0]
        raise RunError(
            f"expert rank {rank} was measured to compute for {times.seconds_LR[layer, rank]} s, "
            "which must be finite and at least 0; experts stay where they are",
            hint="look at that worker's clock",
        )
    return times


def _mean(steps: Sequence[RankTimes]) -> RankTimes:
    """Over the steps in which a rank had rows in a layer."""
    rows_SLR = np.stack([step.rows_LR for step in steps])
    seconds_SLR = np.stack([step.seconds_LR for step in steps])
    measured_SLR = (rows_SLR > 0) & (seconds_SLR > 0)
    number_LR = np.maximum(measured_SLR.sum(axis=0), 1)
    rows_LR, seconds_LR = (
        np.where(measured_SLR, values, 0.0).sum(axis=0) / number_LR
        for values in (rows_SLR, seconds_SLR)
    )
    return RankTimes(rows_LR=rows_LR, seconds_LR=seconds_LR)


def _most_alike(former: Sequence[RankTimes]) -> int:
    """The one that is nearest to the one behind it, which says the same anew."""
    return int(np.argmin([_difference(one, other) for one, other in pairwise(former)]))


def _difference(one: RankTimes, other: RankTimes) -> float:
    """Of the rows of the rank that differs most, relative."""
    difference_LR = np.log1p(one.rows_LR) - np.log1p(other.rows_LR)
    return float(np.sqrt(np.mean(difference_LR**2, axis=0)).max())
