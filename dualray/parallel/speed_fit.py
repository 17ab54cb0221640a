"""How fast each expert rank is, told apart from how many rows it happened to get.

A forward of few rows costs more a row than one of many: kernels are launched and weights are read
however few there are. So rows over seconds makes a rank look fast because it is overloaded, and a
placement that trusted that would leave it overloaded. The time of a layer is therefore taken as
(rows + overhead) / speed, with one overhead, in rows, for all ranks and a speed for each.

Two things say how large the overhead is. A rank's layers, and its rows under other placements,
agree on its speed with the right one, as far as they differ in rows. And ranks of one kind are
equally fast: where the same rank is full in every layer nothing else can tell, so the overhead is
that with which most ranks are alike. A rank that is really slow stays an exception, since one that
lies far from the others counts hardly more than one that lies near.

Shape suffixes: L layers, R expert ranks, P points that were measured, O overheads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualray.parallel.placement import Floats, Ints

OVERHEADS = np.concatenate([[0.0], np.geomspace(0.01, 10.0, 61)])
"""Tried, relative to the mean number of rows."""
LEAST_VARIETY = 0.2
"""How far the rows of some rank must lie from their middle, relative, to tell an overhead from
noise."""
MODEL_ERROR = 0.05
"""What layers of one rank differ from this model anyhow, relative; no fit is taken as better."""
LIKENESS = 0.1
"""How far ranks of one kind are apart, relative."""
INDIFFERENT = 0.5
"""Of two overheads whose -2 log likelihoods are nearer than that, the smaller one is taken."""
AGEING = 0.8
"""Weight of a former placement's points against those of the one behind it."""


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """What expert ranks did in forwards, as means over equal numbers of forwards."""

    rows_LR: Floats
    seconds_LR: Floats
    """Points in which either is 0 were not measured."""


def fit_speeds(now: Sequence[RankTimes], former: Sequence[RankTimes] = ()) -> list[float | None]:
    """Rows a second of every expert rank beyond the overhead; None for ranks without rows.

    now: step by step, with experts where they are; what is measured there is what ranks' speeds
    are. former: a mean for each earlier placement, oldest first; only for what the overhead is.
    """
    num_ranks = now[0].rows_LR.shape[1]
    # Steps with one placement err alike, so that many of them do not say much more than one.
    weights = [AGEING**age for age in range(len(former), 0, -1)] + [len(now) ** -0.5] * len(now)
    points = [_points(times, weight) for times, weight in zip([*former, *now], weights)]
    sizes = [len(rank_P) for rank_P, *_ in points]
    rank_P, rows_P, seconds_P, weight_P = (np.concatenate(column) for column in zip(*points))
    first = sum(sizes[: len(former)])
    if not len(rank_P[first:]):
        return [None] * num_ranks
    overhead = _overhead(rank_P, rows_P, seconds_P, weight_P, num_ranks)
    rank_P, rows_P, seconds_P = rank_P[first:], rows_P[first:], seconds_P[first:]
    log_P = np.log((rows_P + overhead) / seconds_P)
    mean_R, number_R = _means(rank_P, log_P, np.ones_like(log_P), num_ranks)
    return [
        float(np.exp(mean)) if number else None
        for mean, number in zip(mean_R.tolist(), number_R.tolist())
    ]


def _points(times: RankTimes, weight: float) -> tuple[Ints, Floats, Floats, Floats]:
    measured_LR = (times.rows_LR > 0) & (times.seconds_LR > 0)
    rank_P = np.nonzero(measured_LR)[1]
    rows_P, seconds_P = times.rows_LR[measured_LR], times.seconds_LR[measured_LR]
    return rank_P, rows_P, seconds_P, np.full(len(rank_P), weight)


def _overhead(
    rank_P: Ints, rows_P: Floats, seconds_P: Floats, weight_P: Floats, num_ranks: int
) -> float:
    """The most likely one, in rows."""
    measured_R = np.bincount(rank_P, minlength=num_ranks) > 0
    freedom = max(float(weight_P.sum() - measured_R.sum()), 0.0)
    if _variety(rank_P, rows_P, num_ranks) < LEAST_VARIETY:
        freedom = 0.0
    overhead_O = OVERHEADS * np.average(rows_P, weights=weight_P)
    cost_O = np.empty_like(overhead_O)
    for number, overhead in enumerate(overhead_O):
        log_P = np.log((rows_P + overhead) / seconds_P)
        mean_R, differ = _spread(rank_P, log_P, weight_P, num_ranks)
        apart_R = mean_R[measured_R] - np.median(mean_R[measured_R])
        # Layers err as a normal distribution, ranks as a Cauchy distribution, which has outliers.
        layers = freedom * np.log(differ + MODEL_ERROR**2)
        cost_O[number] = layers + 2 * np.log1p((apart_R / LIKENESS) ** 2).sum()
    return float(overhead_O[np.argmax(cost_O <= cost_O.min() + INDIFFERENT)])


def _variety(rank_P: Ints, rows_P: Floats, num_ranks: int) -> float:
    """Half of what the logarithm of one rank's rows covers, of the rank where that is most."""
    most_R, least_R = np.full(num_ranks, -np.inf), np.full(num_ranks, np.inf)
    np.maximum.at(most_R, rank_P, np.log(rows_P))
    np.minimum.at(least_R, rank_P, np.log(rows_P))
    return float((most_R - least_R).max()) / 2


def _means(
    rank_P: Ints, value_P: Floats, weight_P: Floats, num_ranks: int
) -> tuple[Floats, Floats]:
    """Of every rank its mean, 0 without points, and the weight of its points."""
    sum_R = np.bincount(rank_P, value_P * weight_P, minlength=num_ranks)
    weight_R = np.bincount(rank_P, weight_P, minlength=num_ranks).astype(np.float64)
    return sum_R / np.where(weight_R > 0, weight_R, 1.0), weight_R


def _spread(
    rank_P: Ints, value_P: Floats, weight_P: Floats, num_ranks: int
) -> tuple[Floats, float]:
    """Every rank's mean, and the mean square of what its points differ from it."""
    mean_R, _ = _means(rank_P, value_P, weight_P, num_ranks)
    return mean_R, float(np.average((value_P - mean_R[rank_P]) ** 2, weights=weight_P))
