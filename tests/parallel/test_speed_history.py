"""Measurements are kept placement by placement, no more of them than are worth something."""

from __future__ import annotations

import numpy as np
import pytest

from dualray.errors import RunError
from dualray.parallel.speed_fit import RankTimes, fit_speeds
from dualray.parallel.speed_history import FORMER, RECENT, SpeedHistory, checked

SPEEDS = np.array([500.0, 1000.0, 1000.0])
OVERHEAD = 700.0


def times(*rows: float) -> RankTimes:
    """Of one layer, from the rows of three ranks."""
    rows_LR = np.array([rows])
    took_LR = np.where(rows_LR > 0, (rows_LR + OVERHEAD) / SPEEDS, 0.0)
    return RankTimes(rows_LR=rows_LR, seconds_LR=took_LR)


def history(*placements: list[RankTimes]) -> SpeedHistory:
    found = SpeedHistory()
    for number, steps in enumerate(placements):
        if number:
            found.moved()
        for step in steps:
            found.observe(step)
    return found


def test_a_placement_that_is_left_is_kept_as_its_mean() -> None:
    # Rank 2 has rows in one of two steps, and counts as it was then.
    before = [times(900.0, 200.0, 0.0), times(1100.0, 400.0, 500.0)]
    now = [times(500.0, 600.0, 600.0)]
    expected = fit_speeds(now, [times(1000.0, 300.0, 500.0)])
    assert history(before, now).rows_per_s() == expected
    assert np.array(expected) / expected[1] == pytest.approx([0.5, 1, 1], rel=0.1)


def test_nothing_is_known_without_a_step() -> None:
    assert history().rows_per_s() == []
    assert history([], [times(1.0, 1.0, 1.0)]).rows_per_s() == fit_speeds([times(1.0, 1.0, 1.0)])


def test_old_steps_are_forgotten() -> None:
    old, new = [times(1.0, 900.0, 900.0)] * 3, [times(500.0, 400.0, 300.0)] * RECENT
    assert history(old + new).rows_per_s() == history(new).rows_per_s()


def test_many_small_moves_do_not_push_out_what_large_ones_have_shown() -> None:
    first, now = [times(2000.0, 100.0, 100.0)], [times(500.0, 600.0, 600.0)]
    settled = [[times(500.0 + number, 600.0, 600.0)] for number in range(3 * FORMER)]
    # Moves that change little count as one, the last of them.
    assert history(first, *settled, now).rows_per_s() == (
        history(first, settled[-1], now).rows_per_s()
    )
    many = [[times(500.0, 600.0 + 90 * number, 600.0)] for number in range(3 * FORMER)]
    assert history(first, *many, now).rows_per_s() == pytest.approx(SPEEDS, rel=0.1)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_impossible_seconds_are_refused(seconds) -> None:
    good = times(5.0, 6.0, 7.0)
    assert checked(good) is good
    bad = RankTimes(rows_LR=good.rows_LR, seconds_LR=np.array([[1.0, seconds, 1.0]]))
    with pytest.raises(RunError) as error:
        checked(bad)
    assert str(error.value) == (
        f"expert rank 1 was measured to compute for {seconds} s, which must be finite and at least "
        "0; experts stay where they are; look at that worker's clock."
    )
