"""What the next steps' loads and ranks' speeds will be: loads as moving averages of the measured
ones, speeds as they were fitted last.

The averages start without a bias towards zero: they are divided by the weight that they have
gathered so far (as Adam's moments are). E experts, R expert ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from dualray.errors import ConfigError, RunError
from dualray.parallel.placement import Floats


class MovingAverage:
    """Exponential, element by element; elements that are NaN in a step keep what they have."""

    def __init__(self, size: int, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(
                f"the decay of a moving average is {decay} and must be at least 0 and below 1",
                hint="choose 0.9 to look about ten steps back",
            )
        self._decay = decay
        self._sum = np.zeros(size)
        self._weight = np.zeros(size)

    def add(self, values: Floats) -> None:
        seen = ~np.isnan(values)
        kept = np.where(seen, self._decay, 1.0)
        self._sum = kept * self._sum + np.where(seen, (1 - self._decay) * values, 0.0)
        self._weight = kept * self._weight + np.where(seen, 1 - self._decay, 0.0)

    def mean(self) -> Floats:
        """NaN where nothing was seen."""
        seen = self._weight > 0
        return np.where(seen, self._sum / np.where(seen, self._weight, 1.0), np.nan)


class LoadForecast:
    """Loads of every expert of every layer, foreseen from the steps so far."""

    def __init__(self, *, decay: float) -> None:
        self._decay = decay
        MovingAverage(0, decay)  # refuses a bad decay now, not after the first step
        self._layers: dict[int, MovingAverage] = {}
        self._num_experts = 0

    def observe(self, loads: Mapping[int, ArrayLike]) -> None:
        """Take in one step: tokens per expert [E] of each layer.

        Raises RunError, and keeps what it had, for loads that are no counts or of another
        number of experts.
        """
        checked = {layer: self._checked(layer, load) for layer, load in sorted(loads.items())}
        sizes = {len(load_E) for load_E in checked.values()} | {self._num_experts or None}
        sizes.discard(None)
        if len(sizes) > 1:
            raise RunError(
                f"loads are of {' and '.join(map(str, sorted(filter(None, sizes))))} experts, and "
                "all layers of all steps must have as many",
                hint="make a new forecast for another model",
            )
        for layer, load_E in checked.items():
            self._num_experts = len(load_E)
            average = self._layers.setdefault(layer, MovingAverage(len(load_E), self._decay))
            average.add(load_E)

    def predict(self) -> dict[int, Floats]:
        """Tokens per expert [E], float64, of every layer seen so far."""
        return {layer: average.mean() for layer, average in sorted(self._layers.items())}

    @staticmethod
    def _checked(layer: int, load: ArrayLike) -> Floats:
        load_E = np.asarray(load, dtype=np.float64)
        if load_E.ndim != 1 or not load_E.size:
            raise RunError(
                f"the load of layer {layer} has shape {load_E.shape} and must be [experts]",
                hint="give one number of tokens per expert",
            )
        bad = np.flatnonzero(~np.isfinite(load_E) | (load_E < 0))
        if len(bad):
            raise RunError(
                f"the load of layer {layer}, expert {bad[0]} is {load_E[bad[0]]} and must be a "
                "finite number of at least 0; experts stay where they are",
                hint="look for NaN in the router's scores",
            )
        return load_E


class LatestSpeeds:
    """Rows a second of every expert rank, as they were found last."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._speed_R = np.full(num_ranks, np.nan)

    def observe(self, rows_per_s: Sequence[float | None]) -> None:
        """Ranks are this fast; None for one that had no rows to measure, which keeps its speed.

        Raises RunError, and keeps what it had, for speeds that are not above 0 and finite.
        """
        found_R = self.checked(rows_per_s)
        self._speed_R = np.where(np.isnan(found_R), self._speed_R, found_R)

    def checked(self, rows_per_s: Sequence[float | None]) -> Floats:
        """As float64 [R], NaN for None; raises as `observe` does."""
        if len(rows_per_s) != self._num_ranks:
            raise RunError(
                f"speeds are of {len(rows_per_s)} expert ranks and there are {self._num_ranks}",
                hint="give one speed, or None, per expert rank",
            )
        for rank, speed in enumerate(rows_per_s):
            if speed is not None and not 0 < speed < np.inf:
                raise RunError(
                    f"the speed of expert rank {rank} is {speed} rows/s and must be finite and "
                    "above 0; experts stay where they are",
                    hint="give None for a rank that had no rows",
                )
        return np.array([np.nan if speed is None else speed for speed in rows_per_s], dtype=float)

    def predict(self, *, otherwise: float, tolerance: float) -> Floats:
        """Rows a second [R]; ranks that differ by less than `tolerance`, relative, are equal.

        A measurement's noise is no reason to move experts, and equal ranks are
        interchangeable. Unmeasured ranks count as the median of the measured ones, or as
        `otherwise` if there are none.
        """
        known = ~np.isnan(self._speed_R)
        median = float(np.median(self._speed_R[known])) if known.any() else otherwise
        return level(np.where(known, self._speed_R, median), tolerance)


def level(speed_R: Floats, tolerance: float) -> Floats:
    """Speeds in levels: each is the mean of speeds within 1 + `tolerance` of its slowest."""
    levelled_R = np.empty_like(speed_R)
    left = np.ones(len(speed_R), dtype=bool)
    while left.any():
        near = left & (speed_R <= speed_R[left].min() * (1 + tolerance))
        levelled_R[near] = speed_R[near].mean()
        left &= ~near
    return levelled_R
