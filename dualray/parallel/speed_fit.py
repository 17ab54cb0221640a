"""How fast each expert rank is, told apart from how many rows it happened to get.

A forward of few rows costs more a row than one of many: kernels are launched and weights are read
however few there are. So rows over seconds makes a rank look fast because it is overloaded, and a
placement that trusted that would leave it overloaded. The time of a layer is therefore taken as
(rows + overhead) / speed, with one overhead, in rows, for all ranks and a speed for each. The
overhead is found where a rank's layers differ in rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualray.parallel.placement import Floats

OVERHEADS = np.concatenate([[0.0], np.geomspace(0.01, 10.0, 61)])
"""Tried, relative to the mean number of rows."""
LEAST_VARIETY = 0.2
"""How much the rows of a rank's layers must differ, relative, to tell an overhead from noise."""


def fit_speeds(works: Sequence[Sequence[tuple[float, float]]]) -> list[float | None]:
    """Rows a second of every expert rank beyond the overhead; None for ranks without rows.

    works: of each rank, (rows, seconds) of as many layers and workers as were measured, each over
    the same number of forwards.
    """
    points = [
        (rank, rows, seconds)
        for rank, work in enumerate(works)
        for rows, seconds in work
        if rows > 0 and seconds > 0
    ]
    if not points:
        return [None] * len(works)
    rank_P, rows_P, seconds_P = (np.array(column) for column in zip(*points))
    rows_P, seconds_P = rows_P.astype(np.float64), seconds_P.astype(np.float64)
    number_R = np.bincount(rank_P, minlength=len(works))
    _, variety = _log_speeds(rank_P, rows_P, np.ones_like(rows_P), number_R)
    tried = OVERHEADS * rows_P.mean() if variety >= LEAST_VARIETY**2 else OVERHEADS[:1]
    fits = [_log_speeds(rank_P, rows_P + overhead, seconds_P, number_R) for overhead in tried]
    # The right overhead is that with which each rank's layers agree on its speed.
    speed_R, _ = min(fits, key=lambda fit: fit[1])
    return [
        float(np.exp(speed)) if number else None
        for speed, number in zip(speed_R, number_R.tolist())
    ]


def _log_speeds(
    rank_P: np.ndarray, work_P: Floats, seconds_P: Floats, number_R: np.ndarray
) -> tuple[Floats, float]:
    """Each rank's mean logarithm of speed, and the mean square of what layers differ from it."""
    log_P = np.log(work_P / seconds_P)
    mean_R = np.bincount(rank_P, log_P, minlength=len(number_R)) / np.maximum(number_R, 1)
    return mean_R.astype(np.float64), float(np.mean((log_P - mean_R[rank_P]) ** 2))
