"""What a step costs in seconds, learnt from steps: base + row x rows + walk x passes.

A Kalman filter of these three, whose true values wander: contexts grow, batches change and other
programs come and go. Rows are those of all owners, passes those through MTP modules of all
pipelines. A model that is off where it has not been measured does no harm for long: what it
makes the engine choose is measured then.
"""

from __future__ import annotations

_PRIOR = (1.0, 0.02, 0.2)
"""Before anything is measured: of a step with nothing else, a row 2 % and a pass 20 %."""
_DOUBT = (0.5, 2.0, 1.0)
"""Standard deviation of the prior, relative to it."""
_WANDER = 0.02
"""What a cost may change by from step to step, relative to its prior."""
_NOISE = 0.15
"""Standard deviation of a measurement, relative to what is expected."""
_CLIP = 2.0
"""Standard deviations beyond which a measurement counts no further: a step that was held up."""
_LEAST = 1e-3
"""No cost falls below this part of its prior."""


class StepCosts:
    """See the module. `observe` every step that only decodes."""

    def __init__(self) -> None:
        self._scale: float | None = None
        self._costs = list(_PRIOR)
        self._cap = [(cost * doubt) ** 2 for cost, doubt in zip(_PRIOR, _DOUBT)]
        self._covariance = [[self._cap[i] if i == j else 0.0 for j in range(3)] for i in range(3)]

    def seconds(self, rows: int, passes: int) -> float:
        """Expected of a step; in units of its base cost before any was observed."""
        base, row, walk = self._costs
        return (base + row * rows + walk * passes) * (self._scale or 1.0)

    def doubt(self, rows: int, passes: int) -> float:
        """Standard deviation of `seconds`, relative to it; 0 as long as nothing was observed."""
        if self._scale is None:
            return 0.0
        x = (1.0, float(rows), float(passes))
        variance = sum(x[i] * self._covariance[i][j] * x[j] for i in range(3) for j in range(3))
        expected = sum(cost * xi for cost, xi in zip(self._costs, x))
        return max(0.0, variance) ** 0.5 / expected

    def observe(self, rows: int, passes: int, seconds: float) -> None:
        """A step took so long."""
        if seconds <= 0:
            return
        x = (1.0, float(rows), float(passes))
        expected = sum(c * xi for c, xi in zip(self._costs, x))
        if self._scale is None:
            self._scale = seconds / expected
            return
        covariance = self._covariance
        for i in range(3):
            covariance[i][i] = min(covariance[i][i] + (_WANDER * _PRIOR[i]) ** 2, self._cap[i])
        projected = [sum(covariance[i][j] * x[j] for j in range(3)) for i in range(3)]
        noise = (_NOISE * expected) ** 2
        variance = sum(x[i] * projected[i] for i in range(3)) + noise
        most = _CLIP * variance**0.5
        surprise = min(max(seconds / self._scale - expected, -most), most)
        for i in range(3):
            moved = self._costs[i] + projected[i] / variance * surprise
            self._costs[i] = max(moved, _LEAST * _PRIOR[i])
        self._covariance = [
            [covariance[i][j] - projected[i] * projected[j] / variance for j in range(3)]
            for i in range(3)
        ]
