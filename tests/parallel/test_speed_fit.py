"""Ranks' speeds are found whatever rows they got."""

from __future__ import annotations

import numpy as np
import pytest

from dualray.parallel.speed_fit import RankTimes, fit_speeds


def measured(speeds, rows, overhead, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    rows_LR = np.array(rows, dtype=float).T
    took_LR = (rows_LR + overhead) / speeds * random.uniform(1 - noise, 1 + noise, rows_LR.shape)
    return [RankTimes(rows_LR=rows_LR, seconds_LR=np.where(rows_LR > 0, took_LR, 0.0))]


SKEWED = [[900, 300, 100, 40], [50, 600, 20, 300], [50, 100, 880, 660]]


@pytest.mark.parametrize("overhead", [0.0, 50.0, 400.0])
def test_speeds_are_told_apart_from_overhead(overhead) -> None:
    speeds = [1000.0, 1000.0, 500.0]
    works = measured(speeds, SKEWED, overhead)
    # Overheads are tried in steps of 12 %.
    assert fit_speeds(works) == pytest.approx(speeds, rel=0.06)
    plain = (works[0].rows_LR.sum(axis=0) / works[0].seconds_LR.sum(axis=0)).tolist()
    if overhead:
        assert plain != pytest.approx(speeds, rel=0.06)


def test_an_overloaded_rank_is_not_taken_for_a_fast_one() -> None:
    rows = [[2000, 1500, 1800, 900], [100, 50, 300, 150], [200, 90, 40, 110]]
    speeds = fit_speeds(measured([1000.0] * 3, rows, 300.0, noise=0.03))
    assert speeds == pytest.approx([1000.0] * 3, rel=0.1)


def test_layers_that_do_not_differ_give_rows_over_seconds() -> None:
    works = measured([1000.0, 500.0], [[100, 100], [100, 100]], 25.0)
    assert fit_speeds(works) == pytest.approx([800.0, 400.0])


@pytest.mark.parametrize("seed", range(5))
def test_noise_finds_no_overhead_where_layers_hardly_differ(seed) -> None:
    rows = [[100, 101, 99, 100], [100, 98, 100, 101]]
    works = measured([1000.0, 500.0], rows, 0.0, noise=0.1, seed=seed)
    assert fit_speeds(works) == pytest.approx([1000.0, 500.0], rel=0.1)


def test_ranks_without_rows_have_no_speed() -> None:
    assert fit_speeds(measured([1.0, 1.0], [[0], [0]], 0.0)) == [None, None]
    assert fit_speeds(measured([1.0, 100.0], [[0], [10]], 0.0)) == [None, pytest.approx(100.0)]


@pytest.mark.parametrize("overhead", [0.0, 100.0, 1000.0, 5000.0])
def test_where_nothing_else_tells_ranks_are_alike(overhead) -> None:
    rows = [[2210] * 3, [600] * 3, [590] * 3, [600] * 3]
    speeds = np.array(fit_speeds(measured([1000.0] * 4, rows, overhead, noise=0.02)))
    assert speeds.max() / speeds.min() <= 1.1
    # A slow one among them is an exception.
    speeds = np.array(fit_speeds(measured([1000.0, 1000.0, 500.0, 1000.0], rows, overhead)))
    assert speeds / speeds[1] == pytest.approx([1, 1, 0.5, 1], rel=0.1)


def test_a_former_placement_tells_the_overhead_and_the_present_one_the_speeds() -> None:
    speeds = [500.0, 1000.0, 1000.0, 1000.0]
    before = measured(speeds, [[2210], [600], [590], [600]], 1000.0)
    # Rank 0 is full and slow, which an overhead of 0 explains without any rank being slow.
    assert fit_speeds(before)[0] > 0.8 * fit_speeds(before)[1]
    now = measured([600.0, 1000.0, 1000.0, 1000.0], [[1000], [990], [1010], [1000]], 1000.0)
    found = np.array(fit_speeds(now, before))
    assert found / found[1] == pytest.approx([0.6, 1, 1, 1], rel=0.1)
    assert fit_speeds(measured([1.0] * 4, [[0]] * 4, 0.0), before) == [None] * 4
