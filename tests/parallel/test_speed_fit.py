"""Ranks' speeds are found whatever rows they got."""

from __future__ import annotations

import numpy as np
import pytest

from dualray.parallel.speed_fit import fit_speeds


def measured(speeds, rows, overhead, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        [
            (n, (n + overhead) / speed * random.uniform(1 - noise, 1 + noise)) if n else (0, 0.0)
            for n in of_rank
        ]
        for speed, of_rank in zip(speeds, rows)
    ]


SKEWED = [[900, 300, 100, 40], [50, 600, 20, 300], [50, 100, 880, 660]]


@pytest.mark.parametrize("overhead", [0.0, 50.0, 400.0])
def test_speeds_are_told_apart_from_overhead(overhead) -> None:
    speeds = [1000.0, 1000.0, 500.0]
    works = measured(speeds, SKEWED, overhead)
    # Overheads are tried in steps of 12 %.
    assert fit_speeds(works) == pytest.approx(speeds, rel=0.06)
    plain = [sum(n for n, _ in work) / sum(s for _, s in work) for work in works]
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
    assert fit_speeds([[(0, 0.0)], []]) == [None, None]
    assert fit_speeds([[(0, 0.1)], [(10, 0.1)]]) == [None, pytest.approx(100.0)]
